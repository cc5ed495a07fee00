"""Datasets in COCO panoptic format: a folder of images, a folder of PNGs, one JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ...errors import UserError
from . import catalog

IGNORE_LABEL = 65535


def read_json(json_file: str) -> dict:
    """Reads an annotation file. Raises UserError if it is missing or not a COCO panoptic JSON."""
    try:
        content = json.loads(Path(json_file).read_text())
    except OSError as error:
        raise UserError(f"cannot read the panoptic annotations {json_file}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{json_file} is not valid JSON: {error}") from error
    missing = [key for key in ("images", "annotations", "categories") if key not in content]
    if missing:
        raise UserError(f"{json_file} is not in COCO panoptic format: it has no {' and no '.join(missing)}")
    return content


def _categories(content: dict, json_file: str) -> list[dict]:
    """Returns the categories of an annotation file. Raises UserError if one is incomplete."""
    for category in content["categories"]:
        missing = [key for key in ("id", "name", "isthing") if key not in category]
        if missing:
            raise UserError(f"{json_file}: the category {category} has no {' and no '.join(missing)}")
    return content["categories"]


def load(json_file: str, image_root: str, panoptic_root: str, categories: Sequence[dict] | None = None) -> list[dict]:
    """Loads Detectron2's records of a dataset, with classes contiguous in the order of `categories` or of the JSON's.

    Each has "file_name", "pan_seg_file_name", "height", "width", "image_id" and "segments_info". Raises UserError if
    an image or a PNG is missing or a segment's category is undefined.
    """
    content = read_json(json_file)
    categories = categories or _categories(content, json_file)
    contiguous = {category["id"]: index for index, category in enumerate(categories)}
    things = {category["id"] for category in categories if category["isthing"]}
    images = {image["id"]: image for image in content["images"]}
    records = []
    for annotation in content["annotations"]:
        image = images.get(annotation["image_id"])
        if image is None:
            raise UserError(f"{json_file}: no image has the image_id of the annotation {annotation['file_name']}")
        segments = []
        for segment in annotation["segments_info"]:
            category = segment["category_id"]
            if category not in contiguous:
                raise UserError(
                    f"{json_file}: a segment of {annotation['file_name']} has category {category}, "
                    "which its categories do not define"
                )
            segments.append(segment | {"category_id": contiguous[category], "isthing": category in things})
        records.append(
            {
                "file_name": os.path.join(image_root, image["file_name"]),
                "image_id": image["id"],
                "height": image["height"],
                "width": image["width"],
                "pan_seg_file_name": os.path.join(panoptic_root, annotation["file_name"]),
                "segments_info": segments,
            }
        )
    if not records:
        raise UserError(f"{json_file} has no annotations")
    require_files([record["file_name"] for record in records], "images", json_file)
    require_files([record["pan_seg_file_name"] for record in records], "panoptic PNGs", json_file)
    return records


def require_files(files: list[str], what: str, json_file: str) -> None:
    """Raises UserError if any of the files, named as `what` of the JSON, is missing."""
    # Listing each folder once is far cheaper than looking up each file.
    folders = {os.path.dirname(file) for file in files}
    present = {(folder, name) for folder in folders if os.path.isdir(folder) for name in os.listdir(folder)}
    missing = [file for file in files if os.path.split(file) not in present]
    if missing:
        raise UserError(f"{len(missing)} of {len(files)} {what} of {json_file} are missing, first {missing[0]}")


def metadata_of(categories: Sequence[dict]) -> dict:
    """Returns Detectron2's panoptic metadata: names, colors, and the contiguous id of each thing and stuff category."""
    names = [category["name"] for category in categories]
    colors = [category.get("color") or _color(index) for index, category in enumerate(categories)]
    ids = {category["id"]: index for index, category in enumerate(categories)}
    things = {category["id"]: ids[category["id"]] for category in categories if category["isthing"]}
    # As in Detectron2's standard COCO metadata, class names and colors are indexed by all contiguous ids.
    return {
        "thing_classes": names,
        "stuff_classes": names,
        "thing_colors": colors,
        "stuff_colors": colors,
        "thing_dataset_id_to_contiguous_id": things,
        "stuff_dataset_id_to_contiguous_id": {id_: index for id_, index in ids.items() if id_ not in things},
    }


def _color(index: int) -> list[int]:
    """Returns a color for a category without one: the bits of 1 + its index spread over the channels (Pascal VOC)."""
    bits = [(index + 1) >> bit & 1 for bit in range(24)]
    return [sum(bits[3 * bit + channel] << (7 - bit) for bit in range(8)) for channel in range(3)]


def register(
    name: str,
    image_root: str,
    panoptic_root: str,
    json_file: str,
    *,
    categories: Sequence[dict] | None = None,
    prepare: Callable[[], object] | None = None,
    evaluator_type: str = "coco_panoptic_seg",
) -> None:
    """Registers a dataset in Detectron2's catalogs; apart from the categories, files are read when it is first used.

    Args:
        name: name in the catalogs; a previous dataset of the same name is replaced.
        image_root, panoptic_root, json_file: where the data are.
        categories: the JSON's categories, if they are known without reading it.
        prepare: called before the records are loaded, to create the files if needed.
        evaluator_type: selects the dataset's evaluators.
    """
    if categories is None:
        categories = _categories(read_json(json_file), json_file)

    def records() -> list[dict]:
        if prepare is not None:
            prepare()
        return load(json_file, image_root, panoptic_root, categories)

    catalog.register(
        name,
        records,
        image_root=image_root,
        panoptic_root=panoptic_root,
        panoptic_json=json_file,
        evaluator_type=evaluator_type,
        ignore_label=IGNORE_LABEL,
        label_divisor=1000,
        **metadata_of(categories),
    )
