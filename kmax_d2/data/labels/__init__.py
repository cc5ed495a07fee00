"""Reads labels as annotation tools write them: a file for each format, which is told by the content."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ...errors import UserError
from . import coco, cvat, labelme, masks, yolo
from .paint import Item, Labels, paint

__all__ = ["Item", "Labels", "find_format", "masks", "paint"]

Read = Callable[[Path | None, Path | None], Labels]  # of the image folder and the file of class names


def find_format(source: Path) -> tuple[str, Read]:
    """Returns the name of the format of a file or folder, and its reader. Raises UserError if it is none of ours."""
    if not source.exists():
        raise UserError(f"no file or folder {source}")
    folder = source if source.is_dir() else source.parent
    if (source / "SegmentationClass").is_dir():
        return "Pascal VOC", partial(masks.read_voc, source)
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    for file in files:
        if file.suffix in (".yaml", ".yml") and yolo.matches(file):
            return "YOLO", partial(yolo.read, file)
        if file.suffix == ".xml" and cvat.matches(file):
            return "CVAT for images", partial(cvat.read, file)
    for file in (file for file in files if file.suffix == ".json"):
        content = _json(file) or {}
        if "shapes" in content:
            return "LabelMe", partial(labelme.read, folder)
        if {"images", "annotations"} <= content.keys():
            return "COCO instances", partial(coco.read, file, content)
    if source.is_dir() and any(source.rglob("*.png")):
        return "id or class PNGs", partial(masks.read, source)
    if source.is_dir() and any(source.rglob("*.json")):
        return "LabelMe", partial(labelme.read, folder)  # in subfolders, or every file is broken
    raise UserError(
        f"{source} is in no known format: COCO instances, YOLO with its data.yaml, LabelMe, CVAT for images, "
        "Pascal VOC, or PNGs of ids or classes"
    )


def _json(file: Path) -> dict | None:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
