#!/usr/bin/env python
"""Creates ADE20K panoptic (150 classes, COCO format) from SceneParse150's semantic and instance annotations.

Stuff comes from the semantic map, things from the instance map, which wins where the two disagree. A pixel of a thing
class outside all instances is void.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from prepare_common import convert_split, find, make_panoptic, parse_args

from kmax_d2.command_line import run_program
from kmax_d2.data.datasets import ade20k
from kmax_d2.data.panoptic_png import describe
from kmax_d2.errors import UserError
from kmax_d2.images import read_rgb

FOLDERS = {"train": "training", "val": "validation"}
# The instance annotations number only the things, from 1, in the order of all classes.
THINGS = np.array([category["id"] for category in ade20k.CATEGORIES if category["isthing"]])
STUFF = np.array([category["id"] for category in ade20k.CATEGORIES if not category["isthing"]])
BASE = 1000  # a segment's id is BASE · (category id + 1) + its instance number


def panoptic_ids(semantic: np.ndarray, instances: np.ndarray) -> np.ndarray:
    """Combines the two annotations into an id map (H, W), 0 for void.

    Args:
        semantic: (H, W) uint8, 0 for void or 1 + the category id.
        instances: (H, W, 2) uint8, the number of the thing class, from 1, and that of the instance, 0 for none.

    Raises:
        UserError: an instance has no class, or the maps differ in size.
    """
    if semantic.shape != instances.shape[:2]:
        raise UserError(f"{semantic.shape[1]}×{semantic.shape[0]} and {instances.shape[1]}×{instances.shape[0]} differ")
    table = np.zeros(256, dtype=np.int32)
    table[STUFF + 1] = BASE * (STUFF + 1)
    ids = table[semantic]
    is_thing = instances[..., 1] > 0
    classes, numbers = instances[is_thing].astype(np.int32).T
    if np.any((classes < 1) | (classes > len(THINGS))):
        raise UserError(f"an instance has a class outside 1 to {len(THINGS)}")
    ids[is_thing] = BASE * (THINGS[classes - 1] + 1) + numbers
    return ids


def make(semantic: Path, instances: Path) -> tuple[np.ndarray, dict]:
    """Returns the id map of a pair of annotation files and the JSON's entries. Raises UserError with their names."""
    labels = read_rgb(str(semantic))[..., 0]
    numbers = read_rgb(str(instances))[..., :2]
    try:
        ids = panoptic_ids(labels, numbers)
    except UserError as error:
        raise UserError(f"{semantic} and {instances}: {error}") from error
    segments = [
        segment | {"category_id": segment["id"] // BASE - 1, "iscrowd": 0} for segment in describe(ids) if segment["id"]
    ]
    number = int(semantic.stem.rsplit("_", 1)[-1])  # ADE_val_00000001
    image = {"id": number, "file_name": f"{semantic.stem}.jpg", "height": ids.shape[0], "width": ids.shape[1]}
    return ids, {
        "image": image,
        "annotation": {"image_id": number, "file_name": semantic.name, "segments_info": segments},
    }


def convert(semantic: Path, target: Path) -> dict:
    """Returns the JSON's entries of one image, after creating its PNG in the folder `target` if needed."""
    instances = semantic.parents[2] / "annotations_instance" / semantic.parent.name / semantic.name
    return make_panoptic(target / semantic.name, lambda: make(semantic, instances))


def main(arguments: list[str] | None = None) -> None:
    """Converts the splits that a command line names."""
    args = parse_args(__doc__, "ADEChallengeData2016", list(FOLDERS), arguments)
    files = {split: find(args.root / "annotations" / FOLDERS[split], "*.png", "annotations") for split in args.splits}
    for split in args.splits:
        find(args.root / "annotations_instance" / FOLDERS[split], "*.png", "instance annotations")
    for split in args.splits:
        convert_split(convert, files[split], args.root / f"ade20k_panoptic_{split}", ade20k.CATEGORIES, args.workers)


if __name__ == "__main__":
    run_program(main)
