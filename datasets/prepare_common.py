"""Shared by the scripts in this folder: the command line, input discovery, and conversion of all splits."""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from kmax_d2.data import panoptic_png
from kmax_d2.errors import UserError
from kmax_d2.files import make_folder
from kmax_d2.parallel import parallel_map


def parse_args(description: str, folder: str, splits: list[str], arguments: list[str] | None) -> argparse.Namespace:
    """Parses a script's command line into "root" (the dataset's folder), "splits" and "workers".

    Args:
        description: describes the script.
        folder: name of the dataset's folder below DETECTRON2_DATASETS.
        splits: all available splits, which is also the default.
        arguments: the command line; None uses that of the process.
    """
    parser = argparse.ArgumentParser(description=description)
    root = os.path.join(os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets")), folder)
    parser.add_argument("--root", type=Path, default=Path(root), metavar="DIR", help="dataset folder (%(default)s)")
    parser.add_argument("--splits", nargs="+", choices=splits, default=splits, metavar="SPLIT", help=", ".join(splits))
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="number of processes (one per core)")
    return parser.parse_args(arguments)


def find(folder: Path, pattern: str, what: str) -> list[Path]:
    """Returns the files that match a pattern, sorted. Raises UserError if there are none."""
    files = sorted(folder.glob(pattern))
    if not files:
        raise UserError(
            f"no {what} {folder / pattern}: is the download unpacked there? datasets/README.md shows the layout"
        )
    return files


def is_whole(file: Path) -> bool:
    """Tells whether an image file exists and is complete, by its checksums."""
    try:
        with Image.open(file) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def make_panoptic(file: Path, make: Callable[[], tuple[np.ndarray, dict]]) -> dict:
    """Returns a panoptic PNG's entries for the JSON, after writing the PNG if it is missing or truncated.

    Args:
        file: the PNG.
        make: returns the id map (H, W) and the dict of "image" and "annotation".
    """
    entry = panoptic_png.read_annotation(file)
    if entry is None:
        ids, entry = make()
        panoptic_png.write(file, ids, entry)
    return entry


def convert_split(
    convert: Callable[..., dict], files: list[Path], target: Path, categories: list[dict], workers: int
) -> None:
    """Converts all annotations of a split and writes the JSON beside the folder of its PNGs.

    Args:
        convert: takes an annotation file and the keyword "target"; returns what :func:`make_panoptic` does.
        files: the annotation files.
        target: folder of the PNGs, named as the JSON is.
        categories: of the JSON.
        workers: number of processes; 0 uses one per core.
    """
    make_folder(target)
    entries = parallel_map(functools.partial(convert, target=target), files, target.name, workers)
    panoptic_png.write_json(target.with_suffix(".json"), entries, categories)
