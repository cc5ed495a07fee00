"""YOLO segmentation: a data.yaml with the classes, and for each image a text file with a polygon on each line."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import yaml

from ...errors import UserError
from .paint import Item, Labels, Shape, Size, categories_of, fill, image_files

SPLITS = ("train", "val", "test")


def _content(file: Path) -> dict:
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {file}: {' '.join(str(error).split())}") from error
    return content if isinstance(content, dict) else {}


def matches(file: Path) -> bool:
    """Tells whether a YAML file describes a YOLO dataset."""
    return "names" in _content(file)


def draw(line: str, names: list[str], size: Size) -> list[Shape]:
    """Draws a line "class x y x y …", in shares of the image's width and height."""
    first, *values = line.split()
    coordinates = np.array(values, np.float64)
    index = int(first)
    if not 0 <= index < len(names):
        raise UserError(f"the class {index} is not within 0 and {len(names) - 1}")
    if len(values) % 2 or len(values) < 6:
        raise UserError(f"a polygon of {len(values) / 2:g} points")
    if not np.all((coordinates > -0.01) & (coordinates < 1.01)):
        raise UserError("coordinates outside the image; they are shares of its width and height")
    return [Shape(names[index], *fill(coordinates.reshape(-1, 2) * size[::-1], size))]


def _folder(root: Path, file: Path, name: str) -> Path:
    """Returns the image folder or list that a data.yaml names; some exports have one "../" too many."""
    options = [root / name, file.parent / name, file.parent / name.removeprefix("../")]
    return next((path for path in options if path.exists()), options[0])


def _images(path: Path) -> list[Path]:
    if path.is_file():  # a list of images
        return [path.parent / line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not path.is_dir():
        raise UserError(f"no image folder {path}")
    return sorted(set(image_files(path).values()))


def label_file(image: Path) -> Path:
    """Returns the label file of an image: in the folder labels in place of the last images, or beside the image."""
    parts = list(image.parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts).with_suffix(".txt")


def read(file: Path, images: Path | None = None, _: Path | None = None) -> Labels:
    """Reads the splits that a data.yaml names, or with `images` that folder; an image without label file has none."""
    content = _content(file)
    names = content["names"]
    names = [str(name) for name in (names.values() if isinstance(names, dict) else names)]
    labels = Labels(categories_of(names), [])
    root = file.parent / str(content.get("path") or "")
    folders = {split: content[split] for split in SPLITS if content.get(split)} if images is None else {"": images}
    for split, entry in folders.items():
        for folder in entry if isinstance(entry, list) else [entry]:
            for image in _images(Path(folder) if images else _folder(root, file, str(folder))):
                text = label_file(image)
                objects = []
                if text.is_file():
                    lines = text.read_text(errors="replace").splitlines()
                    drawn = [(n, partial(draw, line, names)) for n, line in enumerate(lines, 1) if line.strip()]
                    objects = [(f"{text}: line {number}", line) for number, line in drawn]
                    if not objects:
                        labels.faults.append(f"{text}: an empty file")
                        continue
                labels.items.append(Item(image, objects, split=split))
    return labels
