"""What the readers have in common: regions of an image, and how they become an id map."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from ...errors import UserError

Size = tuple[int, int]  # (height, width) in pixels
Region = tuple[int, int, np.ndarray]  # left, top, and a mask (h, w), bool, from there
LARGEST = 1e6  # coordinate of a polygon, in pixels
BAD = (UserError, ValueError, TypeError, LookupError, AttributeError, OverflowError, OSError)  # from malformed objects


class Shape(NamedTuple):
    """A labeled region: `mask` (h, w), bool, whose first pixel is at (left, top) of the image.

    A `whole` region is all of a class, whose instances, if it has any, are its connected components. One `under` the
    others is covered by them whatever its size. Regions of a class with the same `group` other than 0 are one object.
    """

    name: str
    left: int
    top: int
    mask: np.ndarray
    crowd: bool = False
    whole: bool = False
    under: bool = False
    group: int = 0


Drawn = partial[list[Shape]]  # takes the image's size; may raise any of BAD


@dataclass
class Item:
    """An image file, its objects by what messages call them, its size by the labels, and its split, if these tell."""

    image: Path
    objects: list[tuple[str, Drawn]]
    size: Size | None = None
    split: str = ""


@dataclass
class Labels:
    """The categories, as in COCO panoptic format, the images, and the faults of what could not be read."""

    categories: list[dict]
    items: list[Item]
    faults: list[str] = field(default_factory=list)


def categories_of(names: Iterable[str]) -> list[dict]:
    """Returns categories with ids from 1, all of them things."""
    return [{"id": id_, "name": name, "isthing": 1} for id_, name in enumerate(names, start=1)]


def image_files(folder: Path) -> dict[str, Path]:
    """Returns the image files below a folder by their stem and by their path in it without suffix."""
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in known]
    return {file.stem: file for file in files} | {str(file.relative_to(folder).with_suffix("")): file for file in files}


def corners_of(polygon: Any) -> np.ndarray:
    """Returns the corners (N, 2) of a polygon, flat or in pairs. Raises UserError for fewer than three."""
    corners = np.asarray(polygon, np.float64).reshape(-1, 2)
    if len(corners) < 3:
        raise UserError(f"a polygon of {len(corners)} points")
    if not np.all(np.abs(corners) < LARGEST):
        raise UserError("a polygon with impossible coordinates")
    return corners


def fill(polygon: Any, size: Size) -> Region:
    """Fills the part of a polygon inside the image; its outline, rounded to pixels, belongs to it."""
    points = np.rint(corners_of(polygon)).astype(np.int32)
    (left, top), (right, bottom) = np.maximum(points.min(0), 0), np.minimum(points.max(0) + 1, size[::-1])
    mask = np.zeros((max(0, bottom - top), max(0, right - left)), np.uint8)
    if mask.size:
        cv2.fillPoly(mask, [points - (left, top)], (1,))
    return int(left), int(top), mask > 0


def _draw_group(parts: list[dict], region: Callable[[dict, Size], Region], size: Size) -> list[Shape]:
    shapes = []
    for part in parts:
        left, top, mask = region(part, size)
        x, y = max(0, -left), max(0, -top)  # a mask may reach beyond the image
        mask = mask[y : max(0, size[0] - top), x : max(0, size[1] - left)]
        shapes.append(Shape(part["label"], left + x, top + y, mask, group=1 + parts[0]["number"]))
    return shapes


def grouped(
    where: str, parts: Iterable[dict], region: Callable[[dict, Size], Region], none: Any
) -> list[tuple[str, Drawn]]:
    """Returns the objects of an image: parts with the same "label" and "group_id", unless this is `none`, are one."""
    groups = defaultdict(list)
    for number, part in enumerate(parts):
        group = part.get("group_id", none)
        groups[number if group == none else (part["label"], group)].append(part | {"number": number})
    return [
        (f"{where}, object {found[0]['number']} ({found[0]['label']})", partial(_draw_group, found, region))
        for found in groups.values()
    ]


def paint(
    shapes: Iterable[Shape], size: Size, things: Collection[str], void: Collection[str]
) -> tuple[np.ndarray, dict[int, Shape]]:
    """Paints shapes over each other: those `under` first, then crowds, then the larger before the smaller.

    Stuff of one class is one segment, and what is of a `void` class becomes void. Returns ids (H, W), int32, 0 for
    void, and the shape of each id.
    """
    split: list[Shape] = []
    for shape in shapes:
        if shape.whole and shape.name in things and not shape.crowd:
            count, labels = cv2.connectedComponents(shape.mask.view(np.uint8))
            split += [shape._replace(mask=labels == label) for label in range(1, count)]
        else:
            split.append(shape)
    split.sort(key=lambda shape: (not shape.under, not shape.crowd, -int(shape.mask.sum())))
    ids = np.zeros(size, np.int32)
    painted: dict[int, Shape] = {}
    known: dict[tuple[str, int], int] = {}
    for number, shape in enumerate(split, start=1):
        is_own = shape.name in things and not shape.group
        id_ = number if is_own else known.setdefault((shape.name, shape.group * (shape.name in things)), number)
        id_ = 0 if shape.name in void else id_
        painted[id_] = shape
        height, width = shape.mask.shape
        ids[shape.top : shape.top + height, shape.left : shape.left + width][shape.mask] = id_
    return ids, painted
