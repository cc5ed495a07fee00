"""From a dataset's records to the model's inputs, for training and for test."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.utils.registry import Registry
from panopticapi.utils import rgb2id
from PIL import Image, UnidentifiedImageError

from ..errors import UserError
from .augmentation import RandomPadCrop, ResizeToFit
from .color import ColorPolicy

MAPPER_REGISTRY = Registry("MAPPER")
MAPPER_REGISTRY.__doc__ = "Mappers of training records, named by `INPUT.DATASET_MAPPER_NAME` and called with `(cfg)`."

VOID = 0  # in the mapper's own label maps; masks count from 1


def _read(file: str, image_format: str, what: str) -> np.ndarray:
    """An image file as (H, W, 3) uint8. Raises UserError with its name and what it is."""
    try:
        with Image.open(file) as opened:
            deep = opened.mode == "F" or opened.mode.startswith("I")
        if deep:  # Pillow would cut the values off at 255
            raise UserError(f"the {what} {file} has more than 8 bits a channel; convert it to 8 bits first")
        return detection_utils.read_image(file, image_format)
    except UnidentifiedImageError as error:
        raise UserError(f"cannot read the {what} {file}: it is no image") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the {what} {file}: {reason}") from error


def read_image(record: dict, image_format: str) -> np.ndarray:
    """The record's image (H, W, 3), uint8, turned as its EXIF says. Raises UserError with the file's name."""
    image = _read(record["file_name"], image_format, "image")
    if image.shape[:2] != (record.get("height", image.shape[0]), record.get("width", image.shape[1])):
        raise UserError(
            f"the image {record['file_name']} is {image.shape[1]}×{image.shape[0]}, "
            f"but its record says {record['width']}×{record['height']}"
        )
    return image


def read_segments(record: dict) -> tuple[np.ndarray, list[int]]:
    """The record's masks.

    Returns:
        (H, W) map of 0 for void (crowds too) or 1 + the index of the pixel's mask, and each mask's contiguous class.
        Stuff of one class is one mask.

    Raises UserError with the file's name where the PNG cannot be read.
    """
    ids = rgb2id(_read(record["pan_seg_file_name"], "RGB", "panoptic PNG"))
    classes: list[int] = []
    stuff: dict[int, int] = {}
    label_of_id: dict[int, int] = {}
    for segment in record["segments_info"]:
        if segment.get("iscrowd", 0):
            continue
        category = segment["category_id"]
        if not segment["isthing"] and category in stuff:
            label_of_id[segment["id"]] = stuff[category]
            continue
        classes.append(category)
        label_of_id[segment["id"]] = len(classes)
        if not segment["isthing"]:
            stuff[category] = len(classes)
    present, inverse = np.unique(ids, return_inverse=True)
    labels = np.array([label_of_id.get(int(id_), VOID) for id_ in present])
    # Detectron2 resizes bytes, which are enough for most images, with Pillow, and nothing but floats otherwise.
    labels = labels.astype(np.uint8 if len(classes) < 256 else np.float32)
    return labels[inverse].reshape(ids.shape), classes


@MAPPER_REGISTRY.register()
class PanopticTrainMapper:
    """Augments an image and its masks and makes the model's training input of them.

    Args:
        geometry: augmentations of image and masks, before the color.
        color: augmentations of the image alone.
        placement: augmentations after the color.
        image_format: "RGB" or "BGR".
    """

    @configurable
    def __init__(
        self,
        *,
        geometry: Sequence[T.Augmentation],
        color: Sequence[T.Augmentation],
        placement: Sequence[T.Augmentation],
        image_format: str = "RGB",
    ):
        self.augmentations = T.AugmentationList([*geometry, *color, *placement])
        self.image_format = image_format

    @classmethod
    def from_config(cls, cfg) -> dict:
        options = cfg.INPUT
        size = tuple(options.CROP_SIZE)
        fit = size if options.FIT_CROP else None
        return {
            "geometry": [ResizeToFit(fit, tuple(options.SCALE_RANGE), options.SCALE_STEPS)],
            "color": [ColorPolicy(options.COLOR_LEVEL)] if options.COLOR_POLICY else [],
            "placement": [RandomPadCrop(size, VOID)]
            + ([T.RandomFlip(horizontal=True)] if options.RANDOM_FLIP == "horizontal" else []),
            "image_format": options.FORMAT,
        }

    def __call__(self, record: dict) -> dict:
        """The record with "image" (3, H, W), "segment_ids" (H, W) and "segment_classes" (S,) added."""
        image = read_image(record, self.image_format)
        labels, classes = read_segments(record)
        if labels.shape != image.shape[:2]:
            raise UserError(
                f"the panoptic PNG {record['pan_seg_file_name']} is {labels.shape[1]}×{labels.shape[0]}, "
                f"but its image is {image.shape[1]}×{image.shape[0]}"
            )
        inputs = T.AugInput(image, sem_seg=labels)
        self.augmentations(inputs)
        return record | {
            "image": _to_tensor(inputs.image),
            "segment_ids": torch.from_numpy(inputs.sem_seg.astype(np.int64)) - 1,
            "segment_classes": torch.tensor(classes, dtype=torch.int64),
        }


class PanopticTestMapper:
    """Resizes a test image so that it just fits the crop; the model pads it.

    Args:
        size: (height, width) to fit; None leaves images their own size.
        image_format: "RGB" or "BGR".
    """

    @configurable
    def __init__(self, *, size: tuple[int, int] | None, image_format: str = "RGB"):
        self.augmentations = T.AugmentationList([ResizeToFit(size)])
        self.image_format = image_format

    @classmethod
    def from_config(cls, cfg) -> dict:
        return {"size": tuple(cfg.INPUT.CROP_SIZE) if cfg.INPUT.FIT_CROP else None, "image_format": cfg.INPUT.FORMAT}

    def __call__(self, record: dict) -> dict:
        """The record with "image" (3, H, W) added, and "height" and "width" of the original."""
        image = read_image(record, self.image_format)
        size = {"height": image.shape[0], "width": image.shape[1]}
        inputs = T.AugInput(image)
        self.augmentations(inputs)
        return record | size | {"image": _to_tensor(inputs.image)}


def _to_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
