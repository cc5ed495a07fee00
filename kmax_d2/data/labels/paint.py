"""What the readers have in common: regions of an image, and how they become an id map."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from ...errors import UserError

Size = tuple[int, int]  # (height, width) in pixels
LARGEST = 1e6  # coordinate of a polygon, in pixels
BAD = (UserError, ValueError, TypeError, LookupError, AttributeError, OverflowError, OSError)  # from malformed objects


class Shape(NamedTuple):
    """A labeled region: `mask` (h, w), bool, whose first pixel is at (left, top) of the image.

    A `whole` region is all of a class, whose instances, if it has any, are its connected components. One `under` the
    others is covered by them whatever its size.
    """

    name: str
    left: int
    top: int
    mask: np.ndarray
    crowd: bool = False
    whole: bool = False
    under: bool = False


@dataclass
class Item:
    """An image and its labels.

    Attributes:
        image: the image file.
        objects: pairs of what messages call an object (its file and number) and a partial function that takes the
            image's size and returns the object's shapes; it may raise any of BAD.
        size: the image's size by the labels, if they tell it.
        split: such as "train", or empty.
    """

    image: Path
    objects: list[tuple[str, partial[list[Shape]]]]
    size: Size | None = None
    split: str = ""


@dataclass
class Labels:
    """The categories, as in COCO panoptic format, the images, and the faults of what could not be read."""

    categories: list[dict]
    items: list[Item]
    faults: list[str] = field(default_factory=list)


def categories_of(names: Iterable[str], isthing: int = 1) -> list[dict]:
    """Returns categories with ids from 1."""
    return [{"id": id_, "name": name, "isthing": isthing} for id_, name in enumerate(names, start=1)]


def image_files(folder: Path) -> dict[str, Path]:
    """Returns the image files below a folder by their path in it without suffix, and by their stem where it is one."""
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in known]
    return {file.stem: file for file in files} | {str(file.relative_to(folder).with_suffix("")): file for file in files}


def fill(polygon: Any, size: Size) -> tuple[int, int, np.ndarray]:
    """Fills a polygon of (x, y) corners, pairs or flat; the outline, rounded to pixels, belongs to it.

    Returns (left, top, mask) of the part inside the image. Raises UserError for fewer than three corners.
    """
    corners = np.asarray(polygon, np.float64).reshape(-1, 2)
    if len(corners) < 3:
        raise UserError(f"a polygon of {len(corners)} points")
    if not np.all(np.abs(corners) < LARGEST):
        raise UserError("a polygon with impossible coordinates")
    points = np.rint(corners).astype(np.int32)
    (left, top), (right, bottom) = np.maximum(points.min(0), 0), np.minimum(points.max(0) + 1, size[::-1])
    mask = np.zeros((max(0, bottom - top), max(0, right - left)), np.uint8)
    if mask.size:
        cv2.fillPoly(mask, [points - (left, top)], (1,))
    return int(left), int(top), mask > 0


def join(name: str, regions: Sequence[tuple[int, int, np.ndarray]], size: Size) -> Shape:
    """Returns the union of regions (left, top, mask), which may reach beyond the image, as one shape."""
    union = np.zeros(size, bool)
    for left, top, mask in regions:
        x, y = max(0, -left), max(0, -top)
        window = union[top + y : top + len(mask), left + x : left + mask.shape[1]]
        window |= mask[y : y + window.shape[0], x : x + window.shape[1]]
    left, top, width, height = cv2.boundingRect(union.view(np.uint8))
    return Shape(name, left, top, union[top : top + height, left : left + width])


def _instances(shape: Shape) -> list[Shape]:
    count, labels = cv2.connectedComponents(shape.mask.view(np.uint8))
    return [shape._replace(mask=labels == label) for label in range(1, count)]


def paint(
    shapes: Iterable[Shape], size: Size, things: Collection[str], void: Collection[str]
) -> tuple[np.ndarray, dict[int, Shape]]:
    """Paints shapes over each other: those `under` first, then crowds, then the larger before the smaller.

    Stuff of one class is one segment, and what is of a `void` class becomes void. Returns ids (H, W), int32, 0 for
    void, and the shape of each id.
    """
    split: list[Shape] = []
    for shape in shapes:
        split += _instances(shape) if shape.whole and shape.name in things and not shape.crowd else [shape]
    split.sort(key=lambda shape: (not shape.under, not shape.crowd, -int(shape.mask.sum())))
    ids = np.zeros(size, np.int32)
    painted: dict[int, Shape] = {}
    stuff: dict[str, int] = {}
    for number, shape in enumerate(split, start=1):
        id_ = number if shape.name in things else stuff.setdefault(shape.name, number)
        id_ = 0 if shape.name in void else id_
        painted[id_] = shape
        height, width = shape.mask.shape
        ids[shape.top : shape.top + height, shape.left : shape.left + width][shape.mask] = id_
    return ids, painted


def reason(error: BaseException) -> str:
    """Returns in words what is wrong with an object whose drawing raised one of BAD."""
    if isinstance(error, KeyError):
        return f"no {error.args[0]}"
    return f"{error}" if isinstance(error, UserError) else f"malformed ({error})"
