"""From a dataset's records to the model's inputs, for training and for test."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.utils.registry import Registry
from PIL import Image, UnidentifiedImageError

from ..errors import UserError
from .augmentation import RandomPadCrop, ResizeToFit
from .color import ColorPolicy
from .copy_paste import PARTNER, copy_paste
from .segment_ids import rgb2id

logger = logging.getLogger(__name__)

MAPPER_REGISTRY = Registry("MAPPER")
MAPPER_REGISTRY.__doc__ = "Mappers of training records, named by `INPUT.DATASET_MAPPER_NAME` and called with `(cfg)`."

VOID, PADDING = 0, -1  # in the mapper's own label maps; masks count from 1
NUM_IDS = 1 << 24  # segment ids that a PNG's three bytes can say
PARTNER_SCALE = 0.5  # of the random scales, for the image that is pasted from


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
            f"the image {record['file_name']} is {image.shape[1]}×{image.shape[0]} (turned as its EXIF says), "
            f"but its record says {record['width']}×{record['height']}"
        )
    return image


def read_segments(record: dict) -> tuple[np.ndarray, list[int]]:
    """The record's masks.

    Returns:
        (H, W) int16 map of 0 for void (crowds too) or 1 + the index of the pixel's mask, and each mask's contiguous
        class. Stuff of one class is one mask; a mask may be without a pixel.

    Raises UserError with the file's name where the PNG cannot be read or has segments that the record lacks.
    """
    file = record["pan_seg_file_name"]
    ids = rgb2id(_read(file, "RGB", "panoptic PNG"))
    classes: list[int] = []
    stuff: dict[int, int] = {}
    label_of_id = {0: VOID}
    for segment in record["segments_info"]:
        category = segment["category_id"]
        if not 0 < segment["id"] < NUM_IDS:
            raise UserError(
                f"a segment of {file} has the id {segment['id']} in the JSON; ids are from 1 (0 is void) to "
                f"{NUM_IDS - 1}, which is what a PNG's colors can say"
            )
        if segment.get("iscrowd", 0):
            label_of_id[segment["id"]] = VOID
        elif not segment["isthing"] and category in stuff:
            label_of_id[segment["id"]] = stuff[category]
        else:
            classes.append(category)
            label_of_id[segment["id"]] = len(classes)
            if not segment["isthing"]:
                stuff[category] = len(classes)
    # A table of all ids is faster than a search, and cheap: the system makes no memory that is never touched.
    table = np.zeros(NUM_IDS, np.int16)
    table[list(label_of_id)] = np.array(list(label_of_id.values())) + 1
    labels = table[ids] - np.int16(1)
    unknown = labels < 0
    if unknown.any():
        raise UserError(
            f"the panoptic PNG {file} has segments that its JSON lacks: ids {_some(np.unique(ids[unknown]))}, "
            f"{unknown.sum()} pixels in all"
        )
    return labels, classes


def _some(values: Sequence[int], number: int = 5) -> str:
    return ", ".join(map(str, values[:number])) + (", …" if len(values) > number else "")


@MAPPER_REGISTRY.register()
class PanopticTrainMapper:
    """Augments an image and its masks, pastes from another, and makes the model's training input of them.

    Args:
        augmentations: of image and labels, to one size for all.
        partner_augmentations: the same for the image that is pasted from, where the record has one
            (:class:`~kmax_d2.data.copy_paste.WithPartner`).
        image_format: "RGB" or "BGR".
    """

    @configurable
    def __init__(
        self,
        *,
        augmentations: Sequence[T.Augmentation],
        partner_augmentations: Sequence[T.Augmentation] = (),
        image_format: str = "RGB",
    ):
        self.augmentations = T.AugmentationList(augmentations)
        self.partner_augmentations = T.AugmentationList(partner_augmentations)
        self.image_format = image_format

    @classmethod
    def from_config(cls, cfg) -> dict:
        return {
            "augmentations": build_augmentations(cfg),
            "partner_augmentations": build_augmentations(cfg, PARTNER_SCALE),
            "image_format": cfg.INPUT.FORMAT,
        }

    def __call__(self, record: dict) -> dict:
        """The record with three keys added.

        "image" (3, H, W), uint8, or float16 where padding (127.5) is left; "segment_ids" (H, W) int16, the index of
        the pixel's mask or -1 for void and padding; "segment_classes" (S,), the contiguous class of each mask. Every
        mask has a pixel. A partner is left out.
        """
        sample = self._augmented(record, self.augmentations)
        partner = record.get(PARTNER)
        if partner is not None:
            segments = record["segments_info"] + partner["segments_info"]
            things = {segment["category_id"] for segment in segments if segment["isthing"]}
            sample = copy_paste(sample, self._augmented(partner, self.partner_augmentations), things)
        image, labels, classes = sample
        areas = cv2.calcHist([labels.view(np.uint16)], [0], None, [1 + len(classes)], [0, 1 + len(classes)])
        present = areas[1:, 0] > 0
        ids = np.full(1 + len(classes), -1, np.int16)
        ids[1:][present] = np.arange(present.sum())
        pixels = torch.from_numpy(np.ascontiguousarray(image))
        padding = labels == PADDING
        if padding.any():
            pixels = pixels.half().masked_fill_(torch.from_numpy(padding), 127.5)
        return {key: value for key, value in record.items() if key != PARTNER} | {
            "image": pixels.flip(0) if self.image_format == "BGR" else pixels,
            "segment_ids": torch.from_numpy(ids.take(labels, mode="clip")),
            "segment_classes": torch.tensor(classes, dtype=torch.int64)[torch.from_numpy(present)],
        }

    def _augmented(self, record: dict, augmentations: T.AugmentationList) -> tuple[np.ndarray, np.ndarray, list[int]]:
        image = read_image(record, "RGB")  # the color policy's order
        labels, classes = read_segments(record)
        if labels.shape != image.shape[:2]:
            raise UserError(
                f"the panoptic PNG {record['pan_seg_file_name']} is {labels.shape[1]}×{labels.shape[0]}, "
                f"but its image is {image.shape[1]}×{image.shape[0]}"
            )
        inputs = T.AugInput(image, sem_seg=labels)
        augmentations(inputs)
        return inputs.image.transpose(2, 0, 1), inputs.sem_seg, classes


def build_augmentations(cfg, scale: float = 1.0) -> list[T.Augmentation]:
    """The training augmentations of a config, in the official order, with its range of random scales times `scale`."""
    options = cfg.INPUT
    size = tuple(options.CROP_SIZE)
    least, largest = options.SCALE_RANGE
    fit = size if options.FIT_CROP else None
    augmentations = [ResizeToFit(fit, (least * scale, largest * scale), options.SCALE_STEPS)]
    if options.COLOR_POLICY:
        augmentations.append(ColorPolicy(options.COLOR_LEVEL))
    augmentations.append(RandomPadCrop(size, PADDING))
    if options.RANDOM_FLIP == "horizontal":
        augmentations.append(T.RandomFlip(horizontal=True))
    return augmentations


class SkipBroken:
    """A mapper that gives None, for which Detectron2 takes another sample, where another mapper raises UserError.

    A broken partner is left out, and its record trained on without. Each fault is logged once, with the count of them.

    Args:
        mapper: from a record to a training sample.
        size: records in the dataset; UserError is raised when so many are broken.
    """

    def __init__(self, mapper: Callable[[dict], dict], size: int):
        self.mapper = mapper
        self.size = size
        self.faults: set[str] = set()

    def __call__(self, record: dict) -> dict | None:
        try:
            return self.mapper(record)
        except UserError as error:
            self._log(error)
        if PARTNER in record:
            return self({key: value for key, value in record.items() if key != PARTNER})
        return None

    def _log(self, error: UserError) -> None:
        fault = str(error)
        if fault in self.faults:
            return
        self.faults.add(fault)
        logger.warning("skipped a broken sample, number %d in this process: %s", len(self.faults), fault)
        if len(self.faults) >= self.size:
            raise UserError(f"all {self.size} training samples are broken, the last: {fault}") from error


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
