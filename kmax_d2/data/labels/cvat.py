"""CVAT for images 1.1: one XML with the polygons, boxes, and masks of all images."""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from ...errors import UserError
from .paint import BAD, Item, Labels, Region, Size, categories_of, fill, grouped, image_files


def root_of(file: Path) -> ElementTree.Element:
    """Reads an XML file. Raises UserError if it is broken."""
    try:
        return ElementTree.parse(file).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise UserError(f"cannot read {file}: {error}") from error


def region(shape: dict, size: Size) -> Region:
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
    return left, top, np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)


def read(file: Path, images: Path | None = None, _: Path | None = None) -> Labels:
    """Reads an XML; the images are below `images`, or else below its folder. Elements of one group are one object."""
    root, folder = root_of(file), images or file.parent
    found = root.findall("./meta//labels/label")
    labels = Labels(categories_of(label.findtext("name", "") for label in found), [])
    if not found:
        raise UserError(f"{file} names no labels")
    for category, label in zip(labels.categories, found, strict=True):
        if color := label.findtext("color"):
            category["color"] = list(bytes.fromhex(color.lstrip("#")))
    files = image_files(folder)
    for image in root.iterfind("image"):
        name = Path(image.get("name", ""))
        shapes = [{"tag": element.tag, **element.attrib} for element in image if element.tag != "tag"]
        path = files.get(str(name.with_suffix(""))) or files.get(name.stem) or folder / name
        try:
            size = int(image.attrib["height"]), int(image.attrib["width"])
            labels.items.append(Item(path, grouped(f"{file}: {name}", shapes, region, "0"), size))
        except BAD as error:
            labels.faults.append(f"{file}: the image {name} is malformed ({error!r})")
    return labels
