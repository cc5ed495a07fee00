"""Maps dataset records to the model's inputs, for training and for test."""

import mmap
from collections.abc import Collection, Sequence

import cv2
import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.utils.registry import Registry

from ..errors import UserError
from ..images import read_rgb
from . import panoptic_png
from .augmentation import RandomPadCrop, ResizeToFit
from .color import ColorPolicy
from .copy_paste import PASTE_SOURCE, LabeledImage, copy_paste
from .datasets.coco_panoptic import things_of
from .segment_ids import NUM_IDS

MAPPER_REGISTRY = Registry("MAPPER")
MAPPER_REGISTRY.__doc__ = "Mappers of training records, named by `INPUT.DATASET_MAPPER_NAME` and called with `(cfg)`."

VOID, PADDING = 0, -1  # in the mapper's own label maps; masks count from 1
PASTE_SCALE = 0.5  # factor on the random scales, for the image that is pasted from


def read_image(record: dict) -> np.ndarray:
    """Reads a record's RGB image (H, W, 3), uint8, with its EXIF orientation applied.

    Raises UserError with the file's name if it cannot be read or its size is not the record's.
    """
    image = read_rgb(record["file_name"])
    height, width = image.shape[:2]
    if (height, width) != (record.get("height", height), record.get("width", width)):
        raise UserError(
            f"the image {record['file_name']} is {width}×{height} (with its EXIF orientation), "
            f"but its record says {record['width']}×{record['height']}"
        )
    return image


def is_thing(segment: dict, things: Collection[int]) -> bool:
    """Returns what a segment says of itself or, as those of Cityscapes do not, whether its class is one of `things`."""
    return segment.get("isthing", segment["category_id"] in things)


def read_segments(record: dict, things: Collection[int] = ()) -> tuple[np.ndarray, list[int]]:
    """Reads a record's masks; `things` are the contiguous classes of things, for segments without "isthing".

    Returns an (H, W) int16 map of 0 for void (also crowds) or 1 + the index of the pixel's mask, and the contiguous
    class of each mask. Stuff of one class is one mask; a mask may have no pixels. Raises UserError with the file's name
    if the record has no panoptic annotation, or the PNG cannot be read or has segments that the record does not have.
    """
    if "pan_seg_file_name" not in record or "segments_info" not in record:
        raise UserError(f"the record of {record['file_name']} has no panoptic annotation, but the training needs one")
    file = record["pan_seg_file_name"]
    ids = panoptic_png.read(file)
    classes: list[int] = []
    stuff: dict[int, int] = {}
    label_of_id = {0: VOID}
    for segment in record["segments_info"]:
        id_, category = segment["id"], segment["category_id"]
        if not 0 < id_ < NUM_IDS:
            raise UserError(
                f"a segment of {file} has the id {id_} in the JSON; ids range from 1 (0 is void) to {NUM_IDS - 1}, "
                "the largest that a PNG's colors can encode"
            )
        if segment.get("iscrowd", 0):
            label_of_id[id_] = VOID
            continue
        label = None if is_thing(segment, things) else stuff.get(category)
        if label is None:
            classes.append(category)
            label = stuff[category] = len(classes)
        label_of_id[id_] = label
    # A table of all ids is faster than a search, and cheap: mapped pages that are never touched are never allocated.
    table = np.frombuffer(mmap.mmap(-1, 2 * NUM_IDS), np.int16)
    table[list(label_of_id)] = np.array(list(label_of_id.values())) + 1
    labels = table[ids] - np.int16(1)
    unknown = labels < 0
    if unknown.any():
        values = np.unique(ids[unknown])
        shown = ", ".join(map(str, values[:5])) + (", …" if len(values) > 5 else "")
        raise UserError(
            f"the panoptic PNG {file} has segments that its JSON lacks: ids {shown}, {unknown.sum()} pixels in all"
        )
    return labels, classes


@MAPPER_REGISTRY.register()
class PanopticTrainMapper:
    """Augments an image and its masks, pastes from another image, and builds the model's training input.

    Args:
        augmentations: of image and labels, which give all images the same size.
        paste_augmentations: the same for the image to paste from, if the record has one
            (:class:`~kmax_d2.data.loading.WithPasteSource`).
        pixel_mean: the model's mean of each RGB channel, 0 to 255. Padding has this value, so that the model sees 0.
        things: the contiguous classes of things, for segments without "isthing".
    """

    @configurable
    def __init__(
        self,
        *,
        augmentations: Sequence[T.Augmentation],
        paste_augmentations: Sequence[T.Augmentation] = (),
        pixel_mean: Sequence[float],
        things: Collection[int] = (),
    ):
        self.things = things
        self.augmentations = T.AugmentationList(augmentations)
        self.paste_augmentations = T.AugmentationList(paste_augmentations)
        self.padding = torch.tensor(pixel_mean, dtype=torch.float32).view(-1, 1, 1)
        if torch.equal(self.padding.half().float(), self.padding):  # as the default 127.5: half of the memory
            self.padding = self.padding.half()

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Returns the arguments that a config names."""
        return {
            "augmentations": build_augmentations(cfg),
            "paste_augmentations": build_augmentations(cfg, PASTE_SCALE),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "things": set().union(*(things_of(MetadataCatalog.get(name)) for name in cfg.DATASETS.TRAIN)),
        }

    def __call__(self, record: dict) -> dict:
        """Returns the record without its paste source and with more keys.

        "image" (3, H, W), RGB, uint8, or floating point if it has padding; "segment_ids" (H, W) int16, the index of the
        pixel's mask or -1 for void and padding; "segment_classes" (S,), the contiguous class of each mask. Every mask
        has a pixel. "height" and "width" are the file's, by which Detectron2 groups images of one orientation.
        """
        height, width, (image, labels, classes) = self._augmented(record, self.augmentations)
        source = record.get(PASTE_SOURCE)
        if source is not None:
            segments = record["segments_info"] + source["segments_info"]
            things = {segment["category_id"] for segment in segments if is_thing(segment, self.things)}
            *_, pasted = self._augmented(source, self.paste_augmentations)
            image, labels, classes = copy_paste((image, labels, classes), pasted, things)
        areas = cv2.calcHist([labels.view(np.uint16)], [0], None, [1 + len(classes)], [0, 1 + len(classes)])
        present = areas.ravel()[1:] > 0
        ids = np.full(1 + len(classes), -1, np.int16)
        ids[1:][present] = np.arange(present.sum())
        pixels = torch.from_numpy(np.ascontiguousarray(image))
        padding = labels == PADDING
        if padding.any():
            pixels = torch.where(torch.from_numpy(padding), self.padding, pixels)
        return {key: value for key, value in record.items() if key != PASTE_SOURCE} | {
            "image": pixels,
            "segment_ids": torch.from_numpy(ids.take(labels, mode="clip")),
            "segment_classes": torch.tensor(classes, dtype=torch.int64)[torch.from_numpy(present)],
            **{"height": height, "width": width},
        }

    def _augmented(self, record: dict, augmentations: T.AugmentationList) -> tuple[int, int, LabeledImage]:
        image = read_image(record)
        labels, classes = read_segments(record, self.things)
        if labels.shape != image.shape[:2]:
            raise UserError(
                f"the panoptic PNG {record['pan_seg_file_name']} is {labels.shape[1]}×{labels.shape[0]}, "
                f"but its image is {image.shape[1]}×{image.shape[0]}"
            )
        inputs = T.AugInput(image, sem_seg=labels)
        augmentations(inputs)
        return image.shape[0], image.shape[1], (inputs.image.transpose(2, 0, 1), inputs.sem_seg, classes)


def build_augmentations(cfg, scale: float = 1.0) -> list[T.Augmentation]:
    """Builds the training augmentations in the official order; `scale` is a factor on their random scales."""
    options = cfg.INPUT
    size = tuple(options.CROP_SIZE)
    scale_range = tuple(bound * scale for bound in options.SCALE_RANGE)
    augmentations = [ResizeToFit(size if options.FIT_CROP else None, scale_range, options.SCALE_STEPS)]
    if options.COLOR_POLICY:
        augmentations.append(ColorPolicy(options.COLOR_LEVEL))
    augmentations.append(RandomPadCrop(size, PADDING))
    if options.RANDOM_FLIP != "none":
        vertical = options.RANDOM_FLIP == "vertical"
        augmentations.append(T.RandomFlip(horizontal=not vertical, vertical=vertical))
    return augmentations


class PanopticTestMapper:
    """Resizes a test image so that it just fits `size`, (height, width), or not for None; the model pads it."""

    @configurable
    def __init__(self, *, size: tuple[int, int] | None):
        self.augmentations = T.AugmentationList([ResizeToFit(size)])

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Returns the arguments that a config names."""
        return {"size": tuple(cfg.INPUT.CROP_SIZE) if cfg.INPUT.FIT_CROP else None}

    def __call__(self, record: dict) -> dict:
        """Returns the record with "image" (3, H, W), RGB uint8, and the original "height" and "width" added."""
        return record | self.inputs(read_image(record))

    def inputs(self, image: np.ndarray) -> dict:
        """Returns the model's inputs for an image (H, W, 3), RGB uint8."""
        resized = T.AugInput(image)
        self.augmentations(resized)
        tensor = torch.from_numpy(np.ascontiguousarray(resized.image.transpose(2, 0, 1)))
        return {"image": tensor, "height": image.shape[0], "width": image.shape[1]}
