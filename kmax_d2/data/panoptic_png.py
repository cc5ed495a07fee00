"""Panoptic PNGs, whose colors encode segment ids, and COCO panoptic JSONs, for the tools that create datasets.

Each PNG carries its own annotation as a text chunk and is written under a temporary name first, so a file is either
complete, annotation included, or absent: an interrupted run resumes from the files that exist.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from .. import files
from ..images import read_rgb, read_size
from .segment_ids import id2rgb, rgb2id

CHUNK = "annotation"
WHAT = "panoptic PNG"  # in messages


def describe(ids: np.ndarray) -> list[dict]:
    """Returns "id", "area" and "bbox" [x, y, width, height] of each value of an id map (H, W), by ascending id.

    Areas and boxes are in pixels; void (0) is included.
    """
    height, width = ids.shape
    edges = np.ones((height, width), dtype=bool)
    edges[:, 1:] = ids[:, 1:] != ids[:, :-1]
    # There are far fewer runs of equal pixels in a row than pixels.
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


def read(file: str, size: tuple[int, ...] = ()) -> np.ndarray:
    """Reads a panoptic PNG's segment ids (H, W), int32; `size` is that of its image, if known.

    Raises UserError with its name if it is damaged, gray, or of another size.
    """
    return rgb2id(read_rgb(file, WHAT, gray=False, size=size))


def size_of(file: str) -> tuple[int, int]:
    """Reads the (height, width) of a panoptic PNG from its header. Raises UserError as :func:`read` as far as seen."""
    return read_size(file, WHAT, gray=False)


def write(file: Path, ids: np.ndarray, annotation: dict) -> None:
    """Writes an id map (H, W) of 0 to 2^24 - 1 as a PNG that contains its annotation."""
    files.write_png(file, id2rgb(ids), **{CHUNK: json.dumps(annotation)})


def read_annotation(file: Path) -> dict | None:
    """Reads the annotation inside a PNG; None if the file is missing, broken, or not from :func:`write`."""
    try:
        with Image.open(file) as image:
            text = image.info[CHUNK]
            image.verify()
        return json.loads(text)
    except (OSError, SyntaxError, ValueError, KeyError):
        return None


def write_json(file: Path, entries: list[dict], categories: list[dict]) -> None:
    """Writes a COCO panoptic JSON of entries with the "image" and the "annotation" of each image, and reports it."""
    images, annotations = ([entry[key] for entry in entries] for key in ("image", "annotation"))
    info = {"description": files.MARK}
    files.write_json(file, {"info": info, "images": images, "annotations": annotations, "categories": categories})
    print(f"{file}: {len(entries)} images")
