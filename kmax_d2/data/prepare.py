"""What the scripts in datasets/ share: their command line, the search for their inputs, and one file made or kept."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from . import panoptic_png


def parse_args(description: str, folder: str, splits: list[str], arguments: list[str] | None) -> argparse.Namespace:
    """ "root" (the dataset's folder), "splits" and "workers" of a command line.

    Args:
        description: of the script.
        folder: the dataset's own, below DETECTRON2_DATASETS.
        splits: all that there are; the default.
        arguments: of the command line; None for the process's.
    """
    parser = argparse.ArgumentParser(description=description)
    root = os.path.join(os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets")), folder)
    parser.add_argument("--root", type=Path, default=Path(root), metavar="DIR", help="the dataset (%(default)s)")
    parser.add_argument("--splits", nargs="+", choices=splits, default=splits, metavar="SPLIT", help=", ".join(splits))
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes (one a core)")
    return parser.parse_args(arguments)


def find(folder: Path, pattern: str, what: str) -> list[Path]:
    """The files of a pattern, sorted. Raises UserError where there are none."""
    files = sorted(folder.glob(pattern))
    if not files:
        raise UserError(
            f"no {what} {folder / pattern}: is the download unpacked there? datasets/README.md shows the tree"
        )
    return files


def make_folder(folder: Path) -> Path:
    """The folder, made where it is not there. Raises UserError where it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from error
    return folder


def make_panoptic(file: Path, make: Callable[[], tuple]) -> dict:
    """A panoptic PNG's "image" and "annotation" for the JSON; the PNG is made where it is not there whole.

    Args:
        file: the PNG.
        make: gives the id map (H, W) and the dict with "image" and "annotation".
    """
    entry = panoptic_png.read_annotation(file)
    if entry is None:
        ids, entry = make()
        panoptic_png.write(file, ids, entry)
    return entry


def write_json(file: Path, entries: list[dict], categories: list[dict]) -> None:
    """The COCO panoptic JSON of what :func:`make_panoptic` gave."""
    images, annotations = ([entry[key] for entry in entries] for key in ("image", "annotation"))
    panoptic_png.write_json(file, images, annotations, categories)
    print(f"{file}: {len(entries)} images")
