"""LabelMe: a JSON for each image, with polygons, rectangles, and masks."""

from __future__ import annotations

import base64
import io
import json
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...errors import UserError
from ...parallel import parallel_map
from .masks import read_names
from .paint import Item, Labels, Shape, Size, categories_of, fill, join


def region(shape: dict, size: Size) -> tuple[int, int, np.ndarray]:
    """Draws a shape; raises UserError for one without an area, such as a line."""
    kind, points = shape.get("shape_type") or "polygon", shape["points"]
    if kind == "mask":
        mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(shape["mask"]))))
        return round(points[0][0]), round(points[0][1]), mask > 0
    if kind == "rectangle":
        (x0, y0), (x1, y1) = points
        points, kind = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)], "polygon"
    if kind != "polygon":
        raise UserError(f"a {kind} has no mask")
    return fill(points, size)


def draw(shapes: list[dict], size: Size) -> list[Shape]:
    """Draws the shapes of an object."""
    return [join(shapes[0]["label"], [region(shape, size) for shape in shapes], size)]


def _read(file: Path) -> Item | str:
    """Reads a file; returns a fault if it is broken. Shapes of the same label and group_id are one object."""
    if not file.stat().st_size:
        return f"{file}: an empty file"
    try:
        content = json.loads(file.read_bytes())
        objects: dict[Any, list[dict]] = defaultdict(list)
        for number, shape in enumerate(content["shapes"]):
            group = shape.get("group_id")
            objects[number if group is None else (shape["label"], group)].append({"number": number} | shape)
        image = file.parent / str(content["imagePath"]).replace("\\", "/")
        height, width = content.get("imageHeight"), content.get("imageWidth")
        named = [
            (f"{file}: shape {shapes[0]['number']} ({shapes[0]['label']})", partial(draw, shapes))
            for shapes in objects.values()
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return f"{file}: not a LabelMe file ({error!r})"
    return Item(image, named, (height, width) if height and width else None)


def read(folder: Path, images: Path | None = None, classes: Path | None = None) -> Labels:
    """Reads all files below a folder; the images are where they say, or in the folder `images`.

    The classes are the labels that there are, in alphabetical order, or those of a file.
    """
    found = parallel_map(_read, sorted(folder.rglob("*.json")), "reading labels")
    items = [item for item in found if isinstance(item, Item)]
    for item in items if images else ():
        item.image = Path(images or "") / item.image.name
    names = sorted({function.args[0][0]["label"] for item in items for _, function in item.objects})
    if classes:
        names = list(read_names(classes, folder).values())
    return Labels(categories_of(names), items, [fault for fault in found if isinstance(fault, str)])
