"""Test sets, whose ground truth only the benchmarks' servers have, for `--save-predictions`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES, COCO_CATEGORIES

from ...errors import UserError
from . import coco_panoptic


def load_coco(json_file: str, image_root: str) -> list[dict]:
    """Records of the images that an image_info JSON lists. Raises UserError where it or an image is missing."""
    try:
        images = json.loads(Path(json_file).read_text())["images"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read the list of images {json_file}: {error!r}") from error
    records = [
        {
            "file_name": os.path.join(image_root, image["file_name"]),
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
        }
        for image in images
    ]
    missing = [record["file_name"] for record in records if not os.path.isfile(record["file_name"])]
    if missing:
        raise UserError(f"{len(missing)} of {len(records)} images of {json_file} are missing, first {missing[0]}")
    return records


def load_cityscapes(image_root: str) -> list[dict]:
    """Records of the images below a split's folder. Raises UserError where there is none."""
    suffix = "_leftImg8bit.png"
    files = sorted(Path(image_root).glob(f"*/*{suffix}"))
    if not files:
        raise UserError(f"no images {image_root}/*/*{suffix}")
    return [{"file_name": str(file), "image_id": file.name.removesuffix(suffix)} for file in files]


def register(root: str) -> None:
    """Registers COCO's test sets and Cityscapes'; nothing is read before it is asked for.

    Args:
        root: the folder that coco and cityscapes lie in.
    """
    images = os.path.join(root, "coco", "test2017")
    for split in ("test", "test-dev"):
        json_file = os.path.join(root, "coco", "annotations", f"image_info_{split}2017.json")
        load = partial(load_coco, json_file, images)
        _register(f"coco_2017_{split}_panoptic", load, "coco_panoptic_seg", COCO_CATEGORIES, f"{split}2017")
    load = partial(load_cityscapes, os.path.join(root, "cityscapes", "leftImg8bit", "test"))
    kind = "cityscapes_panoptic_seg"
    _register("cityscapes_fine_panoptic_test", load, kind, CITYSCAPES_CATEGORIES, "cityscapes_panoptic_test")


def _register(name: str, load: Callable[[], list[dict]], kind: str, categories: Sequence[dict], server_name: str):
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(evaluator_type=kind, server_name=server_name, **coco_panoptic.metadata_of(categories))
