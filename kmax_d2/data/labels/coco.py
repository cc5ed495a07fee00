"""COCO instance annotations: polygons, run lengths (compressed or not), and crowds."""

from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import pycocotools.mask as mask_util

from ...errors import UserError
from .paint import Item, Labels, Shape, Size, categories_of, corners_of


def draw(annotation: dict, names: dict[int, str], size: Size) -> list[Shape]:
    """Draws an annotation as pycocotools does."""
    if annotation["category_id"] not in names:
        raise UserError(f"the class {annotation['category_id']} is none of the categories")
    mask: Any = annotation.get("segmentation")
    if not mask:
        raise UserError("a box without a mask")
    if isinstance(mask, dict):
        if tuple(mask["size"]) != size:
            raise UserError(f"its mask is {mask['size'][1]}×{mask['size'][0]}, the image {size[1]}×{size[0]}")
        if isinstance(mask["counts"], list):
            if sum(mask["counts"]) != size[0] * size[1]:
                raise UserError("its run lengths do not add up to the image")
            mask = mask_util.frPyObjects(mask, *size)
    else:
        mask = mask_util.merge(mask_util.frPyObjects([corners_of(part).ravel().tolist() for part in mask], *size))
    left, top, width, height = map(int, mask_util.toBbox(mask))
    mask = mask_util.decode(mask)[top : top + height, left : left + width] > 0
    return [Shape(names[annotation["category_id"]], left, top, mask, crowd=bool(annotation.get("iscrowd", 0)))]


def read(file: Path, content: dict, images: Path | None, _: Path | None = None) -> Labels:
    """Reads a JSON's content; the images are below `images` or else in its folder or the folder images beside it."""
    if any("segments_info" in annotation for annotation in content["annotations"][:1]):
        raise UserError(f"{file} is in COCO panoptic format already")
    try:
        known = [{"isthing": 1} | category for category in content["categories"]]
        names = {category["id"]: category["name"] for category in known}
    except (KeyError, TypeError) as error:
        raise UserError(f"{file} has no valid categories: {error!r}") from error
    if len(set(names.values())) < len(known):
        known = categories_of(dict.fromkeys(names.values()))
    objects = defaultdict(list)
    for number, annotation in enumerate(content["annotations"], start=1):
        where = f"{file}: annotation {annotation.get('id', f'number {number}')}"
        objects[annotation.get("image_id")].append((where, partial(draw, annotation, names)))
    folders = [images] if images else [file.parent, file.parent / "images", file.parent.parent / "images"]
    labels = Labels(known, [])
    for image in content["images"]:
        try:
            files = [folder / image["file_name"] for folder in folders]
            found = next((path for path in files if path.is_file()), files[0])
            size = image["height"], image["width"]
            labels.items.append(Item(found, objects.pop(image["id"], []), size))
        except (KeyError, TypeError) as error:
            labels.faults.append(f"{file}: the image {image} has no valid {error}")
    for image_id, orphans in objects.items():
        labels.faults += [f"{where}: no image has the id {image_id}" for where, _ in orphans]
    return labels
