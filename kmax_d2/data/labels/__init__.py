"""Reads labels as annotation tools write them: a file for each format, which is told by the content."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ...errors import UserError
from . import coco, cvat, labelme, masks, yolo
from .paint import Labels

Read = Callable[[Path | None, Path | None], Labels]  # of the image folder and the file of class names, if given


def find_format(source: Path) -> tuple[str, Read]:
    """Returns the name of the format of a file or folder, and its reader. Raises UserError if it is none of ours."""
    if not source.exists():
        raise UserError(f"no file or folder {source}")
    if (source / "SegmentationClass").is_dir():
        return "Pascal VOC", partial(masks.read_voc, source)
    for file in sorted(source.iterdir()) if source.is_dir() else [source]:
        if file.suffix in (".yaml", ".yml") and "names" in yolo.content_of(file):
            return "YOLO", partial(yolo.read, file)
        if file.suffix == ".xml" and cvat.root_of(file).tag == "annotations":
            return "CVAT for images", partial(cvat.read, file)
        if file.suffix == ".json" and {"images", "annotations"} <= (content := _json(file)).keys():
            return "COCO instances", partial(coco.read, file, content)
        if file.suffix == ".json" and "shapes" in content:
            break
    if source.is_dir() and any(source.rglob("*.json")):
        return "LabelMe", partial(labelme.read, source)
    if source.is_dir() and any(source.rglob("*.png")):
        return "PNGs of ids or classes", partial(masks.read, source)
    raise UserError(
        f"{source} is in no known format: COCO instances, YOLO with its data.yaml, CVAT for images, or a folder of "
        "LabelMe files, of Pascal VOC, or of PNGs of ids or classes"
    )


def _json(file: Path) -> dict:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        content = None
    return content if isinstance(content, dict) else {}
