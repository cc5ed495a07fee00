"""YOLO segmentation: a data.yaml with the classes, and for each image a text file with a polygon on each line."""

from functools import partial
from pathlib import Path

import numpy as np
import yaml

from ...errors import UserError
from .paint import Item, Labels, Shape, Size, categories_of, fill, image_files

SPLITS = ("train", "val", "test")


def content_of(file: Path) -> dict:
    """Reads a YAML file, which may be another than a dataset's. Raises UserError if it is broken."""
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    return content if isinstance(content, dict) else {}


def draw(line: str, names: list[str], size: Size) -> list[Shape]:
    """Draws a line "class x y x y …", in shares of the image's width and height."""
    first, *values = line.split()
    if not 0 <= int(first) < len(names):
        raise UserError(f"the class {first} is not within 0 and {len(names) - 1}")
    shares = np.array(values, np.float64).reshape(-1, 2)
    if not np.all(abs(shares - 0.5) < 0.51):
        raise UserError("coordinates outside the image; they are shares of its width and height")
    return [Shape(names[int(first)], *fill(shares * size[::-1], size))]


def _images(root: Path, file: Path, name: str) -> list[Path]:
    """Returns the images of a split, whose folder or list a data.yaml names; some exports have one "../" too many."""
    paths = [root / name, file.parent / name, file.parent / name.removeprefix("../")]
    path = next((path for path in paths if path.exists()), paths[0])
    if path.is_file():
        return [path.parent / line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not path.is_dir():
        raise UserError(f"{file}: no image folder {path}")
    return sorted(set(image_files(path).values()))


def label_file(image: Path) -> Path:
    """Returns the label file of an image: in the folder labels in place of the last images, or beside the image."""
    head, images, tail = image.as_posix().rpartition("/images/")
    return Path(f"{head}/labels/{tail}" if images else image).with_suffix(".txt")


def read(file: Path, images: Path | None = None, _: Path | None = None) -> Labels:
    """Reads the splits that a data.yaml names, or with `images` that folder; an image without label file has none."""
    content = content_of(file)
    names = content["names"]
    names = [str(name) for name in (names.values() if isinstance(names, dict) else names)]
    labels = Labels(categories_of(names), [])
    root = file.parent / str(content.get("path") or "")
    splits = {"": images.absolute()} if images else {name: content[name] for name in SPLITS if content.get(name)}
    found = [
        (split, image)
        for split, entry in splits.items()
        for folder in (entry if isinstance(entry, list) else [entry])
        for image in _images(root, file, str(folder))
    ]
    for split, image in found:
        text = label_file(image)
        lines = text.read_text(errors="replace").splitlines() if text.is_file() else []
        objects = [(f"{text}: line {n}", partial(draw, line, names)) for n, line in enumerate(lines, 1) if line.strip()]
        if text.is_file() and not objects:
            labels.faults.append(f"{text}: an empty file")
        else:
            labels.items.append(Item(image, objects, split=split))
    return labels
