"""Datasets in COCO panoptic format: a folder of images, a folder of PNGs, one JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from ...errors import UserError

IGNORE_LABEL = 65535


def read_json(json_file: str) -> dict:
    """The annotation file's contents. Raises UserError where it is missing or is no COCO panoptic JSON."""
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
    """The categories of an annotation file. Raises UserError for one that does not say what it is."""
    for category in content["categories"]:
        absent = [key for key in ("id", "name", "isthing") if key not in category]
        if absent:
            raise UserError(f"{json_file}: the category {category} has no {' and no '.join(absent)}")
    return content["categories"]


def load(json_file: str, image_root: str, panoptic_root: str, categories: Sequence[dict] | None = None) -> list[dict]:
    """Detectron2's records of a dataset, classes contiguous in the order of `categories`, else of the JSON's own.

    Each has "file_name", "pan_seg_file_name", "height", "width", "image_id" and "segments_info". Raises UserError where
    an image or a PNG is missing or a segment's category is not defined.
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
            raise UserError(f"{json_file}: the annotation {annotation['file_name']} has an image_id that no image has")
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
    _require_files([record["file_name"] for record in records], "images", json_file)
    _require_files([record["pan_seg_file_name"] for record in records], "panoptic PNGs", json_file)
    return records


def _require_files(files: list[str], what: str, json_file: str) -> None:
    # One listing of each folder is far cheaper than a look-up for each file.
    present: dict[str, set[str]] = {}
    missing = []
    for file in files:
        folder, name = os.path.split(file)
        if folder not in present:
            present[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in present[folder]:
            missing.append(file)
    if missing:
        raise UserError(f"{len(missing)} of {len(files)} {what} of {json_file} are missing, first {missing[0]}")


def metadata_of(categories: Sequence[dict]) -> dict:
    """Detectron2's panoptic metadata: names, colors and the contiguous id of each category, things and stuff."""
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
    """A color for a category that has none: bits of the index spread over the channels, as in Pascal VOC."""
    color = [0, 0, 0]
    index += 1
    for bit in range(8):
        for channel in range(3):
            color[channel] |= ((index >> (3 * bit + channel)) & 1) << (7 - bit)
    return color


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
    """Registers a dataset in Detectron2's catalogs; nothing but the categories is read before it is asked for.

    Args:
        name: name in the catalogs; an earlier dataset of the name is replaced.
        image_root, panoptic_root, json_file: where the data lie.
        categories: the JSON's categories, where they are known without reading it.
        prepare: called before the records are loaded, to make the files if they are not there.
        evaluator_type: names the evaluators of the dataset.
    """
    if categories is None:
        categories = _categories(read_json(json_file), json_file)

    def records() -> list[dict]:
        if prepare is not None:
            prepare()
        return load(json_file, image_root, panoptic_root, categories)

    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, records)
    MetadataCatalog.get(name).set(
        image_root=image_root,
        panoptic_root=panoptic_root,
        panoptic_json=json_file,
        evaluator_type=evaluator_type,
        ignore_label=IGNORE_LABEL,
        label_divisor=1000,
        **metadata_of(categories),
    )
