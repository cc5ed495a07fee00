"""COCO and Cityscapes test splits, whose ground truth only the benchmark servers have, for submissions."""

import json
import os
from functools import partial
from pathlib import Path

from detectron2.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES, COCO_CATEGORIES

from ...errors import UserError
from .coco_panoptic import metadata_of, register_records, require_files

COPIED = ("file_name", "height", "width")  # from a JSON's images to the records
SUFFIX = "_leftImg8bit.png"  # of Cityscapes' images


def load_coco(json_file: str, image_root: str) -> list[dict]:
    """Loads records of the images in an image_info JSON. Raises UserError if it or an image is missing."""
    try:
        images = json.loads(Path(json_file).read_bytes())["images"]
        records = [{"image_id": image["id"]} | {key: image[key] for key in COPIED} for image in images]
        for record in records:
            record["file_name"] = os.path.join(image_root, record["file_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the list of images {json_file}: {error!r}") from error
    require_files([record["file_name"] for record in records], "images", json_file)
    return records


def load_cityscapes(image_root: str) -> list[dict]:
    """Loads records of the images below a split's folder. Raises UserError if there are none."""
    files = sorted(Path(image_root).glob(f"*/*{SUFFIX}"))
    if not files:
        raise UserError(f"no images {image_root}/*/*{SUFFIX}")
    return [{"file_name": str(file), "image_id": file.name.removesuffix(SUFFIX)} for file in files]


def register(root: str) -> None:
    """Registers the test splits below `root`/coco and `root`/cityscapes; files are read on first use."""
    coco = {"evaluator_type": "coco_panoptic_seg", **metadata_of(COCO_CATEGORIES)}
    for split in ("test", "test-dev"):
        json_file = os.path.join(root, "coco", "annotations", f"image_info_{split}2017.json")
        load = partial(load_coco, json_file, os.path.join(root, "coco", "test2017"))
        register_records(f"coco_2017_{split}_panoptic", load, replace=False, server_name=f"{split}2017", **coco)
    register_records(
        "cityscapes_fine_panoptic_test",
        partial(load_cityscapes, os.path.join(root, "cityscapes", "leftImg8bit", "test")),
        replace=False,
        evaluator_type="cityscapes_panoptic_seg",
        server_name="cityscapes_panoptic_test",
        **metadata_of(CITYSCAPES_CATEGORIES),
    )
