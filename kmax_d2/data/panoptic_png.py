"""Panoptic PNGs, whose colors are segment ids, and COCO panoptic JSONs, for the tools that make datasets.

Each PNG carries its own annotation as a text chunk. It is written under another name first, so that a file is there
whole and with its annotation, or not at all: what was interrupted goes on from the files that are there.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..errors import UserError
from .segment_ids import id2rgb

NUM_IDS = 1 << 24  # that a color can tell apart; 0 is void
CHUNK = "annotation"


def describe(ids: np.ndarray) -> list[dict]:
    """The "id", "area" and "bbox" [x, y, width, height] of each value of an id map (H, W), in pixels, ascending."""
    height, width = ids.shape
    edges = np.ones((height, width), dtype=bool)
    edges[:, 1:] = ids[:, 1:] != ids[:, :-1]
    # Runs of equal pixels in a row are few, so that looking at them is far faster than at all pixels.
    starts = np.flatnonzero(edges)
    lengths = np.diff(starts, append=ids.size)
    present, index = np.unique(ids.ravel()[starts], return_inverse=True)
    rows, lefts = np.divmod(starts, width)
    x, y = np.full((2, len(present)), max(height, width))
    right, bottom = np.zeros((2, len(present)), dtype=np.int64)
    np.minimum.at(x, index, lefts)
    np.minimum.at(y, index, rows)
    np.maximum.at(right, index, lefts + lengths)
    np.maximum.at(bottom, index, rows + 1)
    areas = np.bincount(index, weights=lengths)
    boxes = np.stack([x, y, right - x, bottom - y], axis=1)
    return [
        {"id": int(id_), "area": int(area), "bbox": box.tolist()}
        for id_, area, box in zip(present, areas, boxes, strict=True)
    ]


@contextlib.contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """Another name in the same folder, of the same suffix, to write to; it becomes the file's own at the end.

    Raises UserError where it cannot be written.
    """
    unfinished = file.with_name(f".{file.stem}.{os.getpid()}.part{file.suffix}")
    try:
        yield unfinished
        os.replace(unfinished, file)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def write(file: Path, ids: np.ndarray, annotation: dict) -> None:
    """Writes an id map (H, W) of 0 to 2^24 - 1 as a PNG with its annotation inside."""
    info = PngInfo()
    info.add_text(CHUNK, json.dumps(annotation))
    with written_whole(file) as unfinished:
        Image.fromarray(id2rgb(ids)).save(unfinished, pnginfo=info)


def is_whole(file: Path) -> bool:
    """Whether an image file is there and not cut off, by its checksums."""
    try:
        with Image.open(file) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def read_annotation(file: Path) -> dict | None:
    """The annotation inside a PNG; None where the file is missing, broken, or not written by :func:`write`."""
    try:
        with Image.open(file) as image:
            text = image.info[CHUNK]
            image.verify()
        return json.loads(text)
    except (OSError, SyntaxError, ValueError, KeyError):
        return None


def write_json(file: Path, images: list[dict], annotations: list[dict], categories: list[dict]) -> None:
    """Writes a COCO panoptic JSON."""
    content = {"images": images, "annotations": annotations, "categories": categories}
    with written_whole(file) as unfinished:
        unfinished.write_text(json.dumps(content))
