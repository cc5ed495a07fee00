"""Cityscapes for Detectron2's names of it, below any folder: its loader cuts paths at their first dot."""

import os

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import cityscapes_panoptic
from detectron2.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES

from . import coco_panoptic


def load(name: str) -> list[dict]:
    """Loads Detectron2's records of a split, which here have "height", "width", and "isthing" too.

    Raises FileNotFoundError if there is no JSON, and UserError as :func:`.coco_panoptic.load` does.
    """
    metadata = MetadataCatalog.get(name)
    if not os.path.isfile(metadata.panoptic_json):
        raise FileNotFoundError(f"no {metadata.panoptic_json}: run datasets/prepare_cityscapes_panoptic.py")
    roots = metadata.image_root, metadata.panoptic_root
    records = coco_panoptic.load(metadata.panoptic_json, *roots, CITYSCAPES_CATEGORIES)
    for record in records:
        folder, file = os.path.split(record["file_name"])
        labels = file.replace("_leftImg8bit.png", "_gtFine_labelTrainIds.png")
        record["sem_seg_file_name"] = os.path.join(metadata.gt_dir, os.path.basename(folder), labels)
    return records


def register() -> None:
    """Puts :func:`load` in place of Detectron2's own loader, but not of anybody else's."""
    for name in DatasetCatalog.keys() & cityscapes_panoptic._RAW_CITYSCAPES_PANOPTIC_SPLITS.keys():
        if getattr(DatasetCatalog[name], "__module__", "") == cityscapes_panoptic.__name__:
            DatasetCatalog[name] = lambda name=name: load(name)
