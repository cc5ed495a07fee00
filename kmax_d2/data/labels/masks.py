"""PNGs whose values are classes, or class · 1000 + instance as in Cityscapes, or pairs of both as in Pascal VOC."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from detectron2.data.datasets.pascal_voc import CLASS_NAMES
from PIL import Image

from ...errors import UserError
from ...parallel import parallel_map
from ..panoptic_png import describe
from .paint import Drawn, Item, Labels, Shape, Size, image_files

BASE = 1000  # from which a value is class · BASE + instance
VOID = (0, 255, 65535)  # values that are void unless they are named
SUFFIX = re.compile(r"_(leftImg8bit|gtFine_\w+|instanceIds|labelIds|labelTrainIds|mask)$")


def read_values(file: Path, size: Size | None = None) -> np.ndarray:
    """Reads the values (H, W) of a gray, palette, or 16-bit PNG, uint8 or int32.

    Raises UserError if it is broken, has colors, or is of another size than `size`.
    """
    try:
        with Image.open(file) as image:
            values = np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"cannot read it ({error})") from error
    if values.ndim != 2:
        raise UserError("it has colors; its values must be classes")
    if size not in (None, values.shape):
        raise UserError(f"it is {values.shape[1]}×{values.shape[0]}, its image {size[1]}×{size[0]}")
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


def _shapes(values: np.ndarray, names: Mapping[int, str | None], deep: bool, under: bool) -> list[Shape]:
    """Returns the shapes of values (H, W), class · BASE + instance, and below BASE all of a class that has no instance.

    If the PNG is `deep` enough for instances, the latter is a crowd. A value without class gets a name of no class.
    """
    shapes = []
    for segment in describe(values):
        value, (left, top, width, height) = segment["id"], segment["bbox"]
        class_, whole = (value, True) if value < BASE else (value // BASE, False)
        name = names.get(class_, "" if value in VOID else f"of the value {value}")
        if name:
            mask = values[top : top + height, left : left + width] == value
            shapes.append(Shape(name, left, top, mask, whole and deep, whole, under))
    return shapes


def draw(file: Path, names: Mapping[int, str | None], under: bool, size: Size) -> list[Shape]:
    """Draws the classes and instances of a PNG; a class of the name None is left out."""
    values = read_values(file, size)
    return _shapes(values, names, values.dtype != np.uint8, under)


def draw_voc(file: Path, names: dict[int, str], size: Size) -> list[Shape]:
    """Draws the instances of a PNG of classes, which the PNG of the same name in SegmentationObject tells."""
    classes = read_values(file, size).astype(np.int32)
    objects = read_values(file.parents[1] / "SegmentationObject" / file.name, size)
    void = np.isin(classes, VOID) | np.isin(objects, VOID)
    return _shapes(np.where(void, 0, classes * BASE + objects), names, True, False)


def _instance_classes(file: Path) -> set[int]:
    try:
        values = read_values(file).astype(np.int32)
    except UserError:
        return set()  # a fault when it is drawn
    return set((np.unique(values[(values >= BASE) & ~np.isin(values, VOID)]) // BASE).tolist())


def mask_files(folder: Path) -> dict[str, Path]:
    """Returns the PNGs below a folder by the stem of their images."""
    return {SUFFIX.sub("", file.stem): file for file in sorted(folder.rglob("*.png"))}


def _labels(
    names: dict[int, str], things: set[int], files: dict[str, Path], images: Path, drawn: Callable[[Path], Drawn]
) -> Labels:
    known = {SUFFIX.sub("", stem): file for stem, file in image_files(images).items() if file not in files.values()}
    items = [Item(known.get(stem, images / f"{stem}.jpg"), [(str(file), drawn(file))]) for stem, file in files.items()]
    return Labels([{"id": v, "name": n, "isthing": int(v in things)} for v, n in sorted(names.items())], items)


def read(source: Path, images: Path | None = None, classes: Path | None = None) -> Labels:
    """Reads a folder of PNGs; the images are in `images`, or else in the folder images beside it.

    Classes are things if a 16-bit PNG has instances of them.
    """
    names, files = read_names(classes, source), mask_files(source)
    things = set().union(*parallel_map(_instance_classes, files.values(), "looking for instances"))
    images = images or source.parent / "images"
    return _labels(names, things, files, images, lambda file: partial(draw, file, names, False))


def read_voc(source: Path, images: Path | None = None, classes: Path | None = None) -> Labels:
    """Reads the folders SegmentationClass and SegmentationObject with the images in JPEGImages."""
    names = read_names(classes, source) if classes else {i: str(name) for i, name in enumerate(CLASS_NAMES, start=1)}
    files, images = mask_files(source / "SegmentationClass"), images or source / "JPEGImages"
    return _labels(names, set(names), files, images, lambda file: partial(draw_voc, file, names))
