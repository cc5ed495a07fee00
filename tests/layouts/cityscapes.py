"""Cityscapes: drawn scenes with the four files of the download for each image, prepared by the project's script."""

import json
from pathlib import Path

import numpy as np
from cityscapesscripts.helpers.labels import name2label
from PIL import Image

from . import prepare

CITIES = {"train": ("aachen", "bochum"), "val": ("frankfurt", "munster"), "test": ("berlin",)}
SIZE = 64, 128  # height and width


def miniature_cityscapes(folder):
    """Writes `cityscapes/` with leftImg8bit and gtFine (of test only void, as published), and prepares it."""
    root = Path(folder) / "cityscapes"
    for split, cities in CITIES.items():
        for index, city in enumerate(cities):
            stem = f"{city}_{index:06d}_000019"
            objects = _scene(index)
            (root / "leftImg8bit" / split / city).mkdir(parents=True)
            _paint(objects).save(root / f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png")
            (root / "gtFine" / split / city).mkdir(parents=True)
            _write_truth(str(root / "gtFine" / split / city / f"{stem}_gtFine_"), objects if split != "test" else [])
    prepare("cityscapes", root)


def _write_truth(prefix, objects):
    """Writes polygons, colors, label ids and instance ids, drawn here as cityscapesscripts would."""
    height, width = SIZE
    polygons = {"imgHeight": height, "imgWidth": width, "objects": objects}
    Path(f"{prefix}polygons.json").write_text(json.dumps(polygons))
    label_ids, instance_ids = np.zeros(SIZE, np.uint8), np.zeros(SIZE, np.uint16)
    colors, counts = np.zeros((*SIZE, 3), np.uint8), {}
    for item in objects:
        (left, top), (right, bottom) = item["polygon"][0], item["polygon"][2]
        region = slice(top, bottom + 1), slice(left, right + 1)
        label = name2label[item["label"].removesuffix("group")]
        label_ids[region], colors[region], instance_ids[region] = label.id, label.color, label.id
        if label.hasInstances and label.name == item["label"]:
            instance_ids[region] = 1000 * label.id + counts.setdefault(label.name, 0)
            counts[label.name] += 1
    Image.fromarray(label_ids).save(f"{prefix}labelIds.png")
    Image.fromarray(instance_ids).save(f"{prefix}instanceIds.png")
    Image.fromarray(colors).convert("RGBA").save(f"{prefix}color.png")


def _scene(index):
    """Overlapping cars, people, a rider on a bicycle, a group of cars, and regions that are not evaluated."""
    shift = 7 * index
    boxes = [
        ("sky", 0, 0, 127, 24),
        ("building", 20 + shift, 6, 70, 30),
        ("vegetation", 71, 10, 127, 30),
        ("road", 0, 31, 127, 63),
        ("sidewalk", 0, 31, 30, 40),
        ("car", 34, 30 - index, 58, 44),
        ("car", 50 + shift, 32, 76, 48),
        ("cargroup", 84, 28, 106, 36),
        ("person", 4, 24, 13, 44),
        ("person", 17, 26, 25, 45),
        ("bicycle", 100 - shift, 44, 122 - shift, 56),
        ("rider", 104 - shift, 34, 114 - shift, 50),
        ("ego vehicle", 0, 58, 127, 63),
    ]
    return [
        {"label": label, "polygon": [[left, top], [right, top], [right, bottom], [left, bottom]]}
        for label, left, top, right, bottom in boxes
    ]


def _paint(objects):
    image = np.random.RandomState(0).randint(0, 60, (*SIZE, 3)).astype(np.uint8)
    for number, item in enumerate(objects):
        (left, top), (right, bottom) = item["polygon"][0], item["polygon"][2]
        image[top : bottom + 1, left : right + 1] += np.array([13 * number, 190 - 15 * number, 90], np.uint8)
    return Image.fromarray(image)
