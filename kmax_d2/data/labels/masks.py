"""PNGs whose values are classes, or class · 1000 + instance as in Cityscapes, or pairs of both as in Pascal VOC."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from detectron2.data.datasets.pascal_voc import CLASS_NAMES
from PIL import Image

from ...errors import UserError
from ...parallel import parallel_map
from ..panoptic_png import describe
from .paint import Item, Labels, Shape, Size, image_files

BASE = 1000  # from which a value is class · BASE + instance
VOID = (0, 255, 65535)  # values that are void unless they are named
SUFFIX = re.compile(r"_(leftImg8bit|gtFine_\w+|instanceIds|labelIds|labelTrainIds|mask)$")


def read_values(file: Path) -> np.ndarray:
    """Reads the values (H, W) of a gray, palette, or 16-bit PNG, uint8 or int32. Raises UserError if it is broken."""
    try:
        with Image.open(file) as image:
            values = np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"cannot read the mask {file}: {error}") from error
    if values.ndim != 2:
        raise UserError(f"the mask {file} has colors; its values must be classes")
    return values if values.dtype == np.uint8 else values.astype(np.int32)


def read_names(file: Path | None, source: Path) -> dict[int, str]:
    """Reads the class names of values: a line each, from 0, or "VALUE NAME"; from a file or classes.txt in `source`."""
    file = file or source / "classes.txt"
    try:
        lines = file.read_text().splitlines()
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read the class names {file}: write them there or name a file with --classes, "
            'one a line for the values from 0, or "VALUE NAME"'
        ) from error
    names = {}
    for number, line in enumerate(line.strip() for line in lines):
        if line:
            numbered = re.fullmatch(r"(\d+)[\s:,]+(.+)", line)
            names[int(numbered[1]) if numbered else number] = numbered[2] if numbered else line
    return names


def _require_size(values: np.ndarray, size: Size) -> None:
    if values.shape != size:
        raise UserError(f"is {values.shape[1]}×{values.shape[0]}, its image {size[1]}×{size[0]}")


def draw(file: Path, names: Mapping[int, str | None], under: bool, size: Size) -> list[Shape]:
    """Draws the classes and instances of a PNG; 16-bit values below BASE are groups of instances, or stuff.

    A class of the name None is left out.
    """
    values = read_values(file)
    _require_size(values, size)
    shapes = []
    for segment in describe(values):
        value, (left, top, width, height) = segment["id"], segment["bbox"]
        class_ = value if value < BASE else value // BASE
        if class_ not in names:
            if value in VOID:
                continue
            raise UserError(f"the value {value} is none of the classes")
        if name := names[class_]:
            mask, group = values[top : top + height, left : left + width] == value, value < BASE
            shapes.append(Shape(name, left, top, mask, group and values.dtype != np.uint8, group, under))
    return shapes


def draw_voc(file: Path, names: dict[int, str], size: Size) -> list[Shape]:
    """Draws the instances of a PNG of classes, which the PNG of the same name in SegmentationObject tells."""
    pair = file, file.parents[1] / "SegmentationObject" / file.name
    classes, objects = (read_values(path).astype(np.int32) for path in pair)
    for values in (classes, objects):
        _require_size(values, size)
    void = np.isin(classes, VOID) | np.isin(objects, VOID)
    shapes = []
    for segment in describe(np.where(void, 0, classes * BASE + objects)):
        value, (left, top, width, height) = segment["id"], segment["bbox"]
        if value and value // BASE not in names:
            raise UserError(f"the value {value // BASE} is none of the classes")
        window = slice(top, top + height), slice(left, left + width)
        if value:
            mask = (classes[window] == value // BASE) & (objects[window] == value % BASE)
            shapes.append(Shape(names[value // BASE], left, top, mask))
    return shapes


def _instance_classes(file: Path) -> set[int]:
    try:
        values = read_values(file)
    except UserError:
        return set()  # a fault when it is drawn
    return set() if values.dtype == np.uint8 else set((np.unique(values[values >= BASE]) // BASE).tolist()) - {65}


def _labels(names: dict[int, str], things: set[int], items: list[Item]) -> Labels:
    return Labels([{"id": v, "name": n, "isthing": int(v in things)} for v, n in sorted(names.items())], items)


def mask_files(folder: Path) -> dict[str, Path]:
    """Returns the PNGs below a folder by the stem of their images."""
    return {SUFFIX.sub("", file.stem): file for file in sorted(folder.rglob("*.png"))}


def read(source: Path, images: Path | None = None, classes: Path | None = None) -> Labels:
    """Reads a folder of PNGs; the images are in `images`, or else in the folder images beside it.

    Classes are things if a 16-bit PNG has instances of them.
    """
    names, files = read_names(classes, source), mask_files(source)
    folder = images or source.parent / "images"
    found = {SUFFIX.sub("", stem): file for stem, file in image_files(folder).items() if file not in files.values()}
    things = set().union(*parallel_map(_instance_classes, files.values(), "looking for instances"))
    items = [
        Item(found.get(stem, folder / f"{stem}.jpg"), [(str(file), partial(draw, file, names, False))])
        for stem, file in files.items()
    ]
    return _labels(names, things, items)


def read_voc(source: Path, images: Path | None = None, classes: Path | None = None) -> Labels:
    """Reads the folders SegmentationClass and SegmentationObject with the images in JPEGImages."""
    names = read_names(classes, source) if classes else dict(enumerate(CLASS_NAMES, start=1))
    folder = images or source / "JPEGImages"
    found, items = image_files(folder), []
    for file in sorted((source / "SegmentationClass").glob("*.png")):
        image = found.get(file.stem, folder / f"{file.stem}.jpg")
        items.append(Item(image, [(str(file), partial(draw_voc, file, names))]))
    return _labels(names, set(names), items)
