#!/usr/bin/env python
"""Creates semantic PNGs from COCO's panoptic ones: contiguous classes 0 to 132, 255 for void.

They are meant for other semantic tools: training and evaluation here read the panoptic PNGs.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from PIL import Image
from prepare_common import is_whole, parse_args

from kmax_d2.command_line import run_program
from kmax_d2.data.datasets import coco_panoptic
from kmax_d2.evaluation.semantic import segment_classes
from kmax_d2.files import make_folder, whole_file
from kmax_d2.parallel import parallel_map

VOID = 255


def convert(record: dict, target: Path) -> None:
    """Creates one PNG in the folder `target` if it is missing or truncated."""
    png = record["pan_seg_file_name"]
    file = target / Path(png).name
    if is_whole(file):
        return
    classes = segment_classes(png, record["segments_info"], VOID).astype(np.uint8)
    with whole_file(file) as unfinished:
        Image.fromarray(classes).save(unfinished)


def main(arguments: list[str] | None = None) -> None:
    """Converts the splits that a command line names."""
    args = parse_args(__doc__, "coco", ["train", "val"], arguments)
    for split in args.splits:
        name = f"{split}2017"
        json_file = args.root / "annotations" / f"panoptic_{name}.json"
        records = coco_panoptic.load(str(json_file), str(args.root / name), str(args.root / f"panoptic_{name}"))
        target = make_folder(args.root / f"panoptic_semseg_{name}")
        parallel_map(functools.partial(convert, target=target), records, split, args.workers)
        print(f"{target}: {len(records)} images")


if __name__ == "__main__":
    run_program(main)
