"""CVAT for images 1.1: one XML with the polygons, boxes, and masks of all images."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from ...errors import UserError
from .paint import Item, Labels, Shape, Size, fill, image_files, join

AREAS = ("polygon", "box", "mask")


def _root(file: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(file).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise UserError(f"cannot read {file}: {error}") from error


def matches(file: Path) -> bool:
    """Tells whether an XML file is from CVAT."""
    return _root(file).tag == "annotations"


def region(shape: dict, size: Size) -> tuple[int, int, np.ndarray]:
    """Draws an element's attributes and its "tag"; raises UserError for one without an area."""
    if shape["tag"] == "polygon":
        return fill([point.split(",") for point in shape["points"].split(";")], size)
    if shape["tag"] == "box":
        x0, y0, x1, y1 = (float(shape[key]) for key in ("xtl", "ytl", "xbr", "ybr"))
        return fill([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], size)
    if shape["tag"] != "mask":
        raise UserError(f"a {shape['tag']} has no mask")
    left, top, width, height = (int(shape[key]) for key in ("left", "top", "width", "height"))
    runs = [int(run) for run in shape["rle"].split(",")]  # of zeros and ones in turn, row by row
    mask = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return left, top, mask.reshape(height, width)


def draw(shapes: list[dict], size: Size) -> list[Shape]:
    """Draws the elements of an object."""
    return [join(shapes[0]["label"], [region(shape, size) for shape in shapes], size)]


def read(file: Path, images: Path | None = None, _: Path | None = None) -> Labels:
    """Reads an XML; the images are below `images`, or else below its folder. Elements of one group are one object."""
    root, labels = _root(file), Labels([], [])
    for id_, label in enumerate(root.iterfind("./meta//labels/label"), start=1):
        color = (label.findtext("color") or "").lstrip("#")
        category: dict[str, Any] = {"id": id_, "name": label.findtext("name", ""), "isthing": 1}
        labels.categories.append(category | ({"color": list(bytes.fromhex(color))} if len(color) == 6 else {}))
    found = image_files(images or file.parent)
    for image in root.iterfind("image"):
        name = Path(image.get("name", ""))
        objects: dict[Any, list[dict]] = defaultdict(list)
        for number, element in enumerate(image):
            if element.tag == "tag":  # describes the whole image
                continue
            group = element.get("group_id", "0")
            shape = {"tag": element.tag, "number": number, **element.attrib}
            objects[number if group == "0" else (element.get("label"), group)].append(shape)
        named = [
            (
                f"{file}: image {name}, {shapes[0]['tag']} {shapes[0]['number']} ({shapes[0].get('label')})",
                partial(draw, shapes),
            )
            for shapes in objects.values()
        ]
        path = found.get(str(name.with_suffix(""))) or found.get(name.stem) or (images or file.parent) / name
        try:
            labels.items.append(Item(path, named, (int(image.attrib["height"]), int(image.attrib["width"]))))
        except (KeyError, ValueError) as error:
            labels.faults.append(f"{file}: image {name}: no valid {error}")
    if not labels.categories:
        raise UserError(f"{file} names no labels")
    return labels
