"""LabelMe: a JSON for each image, with polygons, rectangles, and masks."""

import base64
import io
import json
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ...errors import UserError
from ...parallel import parallel_map
from .masks import read_names
from .paint import BAD, Item, Labels, Region, Size, categories_of, fill, grouped


def region(shape: dict, size: Size) -> Region:
    """Draws a shape; raises UserError for one without an area, such as a line."""
    kind, points = shape.get("shape_type") or "polygon", shape["points"]
    if kind == "mask":
        mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(shape["mask"]))))
        return round(points[0][0]), round(points[0][1]), mask > 0
    if kind == "rectangle":
        (x0, y0), (x1, y1) = points
        points = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    elif kind != "polygon":
        raise UserError(f"a {kind} has no mask")
    return fill(points, size)


def _read(file: Path, images: Path | None) -> tuple[Item | None, set[str], str]:
    """Reads a file; returns its image, its labels, and what is wrong if it is broken."""
    if not file.stat().st_size:
        return None, set(), f"{file}: an empty file"
    try:
        content = json.loads(file.read_bytes())
        image = file.parent / str(content["imagePath"]).replace("\\", "/")
        item = Item(images / image.name if images else image, grouped(str(file), content["shapes"], region, None))
        if content.get("imageHeight") and content.get("imageWidth"):
            item.size = content["imageHeight"], content["imageWidth"]
        return item, {shape["label"] for shape in content["shapes"]}, ""
    except (*BAD, RecursionError) as error:
        return None, set(), f"{file}: not a LabelMe file ({error!r})"


def read(folder: Path, images: Path | None = None, classes: Path | None = None) -> Labels:
    """Reads all files below a folder; the images are where they say, or in the folder `images`.

    The classes are the labels that there are, in alphabetical order, or those of a file.
    """
    found = parallel_map(partial(_read, images=images), sorted(folder.rglob("*.json")), "reading labels")
    names = sorted(set().union(*(labels for _, labels, _ in found)))
    if classes:
        names = list(read_names(classes, folder).values())
    faults = [fault for _, _, fault in found if fault]
    return Labels(categories_of(names), [item for item, *_ in found if item], faults)
