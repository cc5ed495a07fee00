"""Results as files for other programs: COCO's panoptic and instance formats, and class maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import Metadata
from detectron2.evaluation.coco_evaluation import instances_to_coco_json

from .. import files
from ..data import panoptic_png
from ..data.datasets.coco_panoptic import categories_of
from ..errors import UserError
from .result import Result


class CocoFiles:
    """Writes results for many images; the JSON files follow when the block ends, also by an error.

    Args:
        metadata: the dataset's, whose category ids are in all files.
        panoptic: COCO panoptic JSON; its PNGs are in the folder of the same name without ".json".
        instances: COCO instance JSON, with run-length encoded masks and scores.
        semantic: folder of PNGs, whose gray values are category ids.

    Raises:
        UserError: a JSON file has another suffix, or a file cannot be written.
    """

    def __init__(self, metadata: Metadata, panoptic: Path | None, instances: Path | None, semantic: Path | None):
        self.panoptic, self.instances, self.semantic = panoptic, instances, semantic
        self.categories = categories_of(metadata)
        self.images: list[dict] = []
        self.segments: list[dict] = []
        self.masks: list[dict] = []

    def __enter__(self) -> CocoFiles:
        return self

    def add(self, result: Result, name: str, stem: str) -> None:
        """Adds the result for an image, with the file name to give it in the JSONs and the stem of its PNGs."""
        height, width = result.panoptic.ids.shape
        id_ = len(self.images) + 1
        if self.panoptic is not None:
            annotation = result.to_coco() | {"file_name": f"{stem}.png"}
            size = {"height": height, "width": width}
            panoptic_png.write(png_folder(self.panoptic) / f"{stem}.png", result.panoptic.ids, size | annotation)
            self.segments.append({"image_id": id_, **annotation})
        if self.semantic is not None:
            ids = np.array([category["id"] for category in self.categories])
            ids = ids.astype(np.uint8 if ids.max() < 256 else np.uint16)
            files.write_png(self.semantic / f"{stem}.png", ids[result.semantic])
        if self.instances is not None:
            for mask in instances_to_coco_json(result.instances, id_):
                category, area = self.categories[mask["category_id"]]["id"], float(mask_util.area(mask["segmentation"]))
                number = {"id": len(self.masks) + 1, "category_id": category}
                self.masks.append(mask | number | {"area": area, "iscrowd": 0})
        self.images.append({"id": id_, "file_name": name, "height": height, "width": width})

    def __exit__(self, *error: object) -> None:
        info = {"description": files.MARK}
        content = {"info": info, "images": self.images, "annotations": self.segments, "categories": self.categories}
        if self.panoptic is not None:
            files.write_json(self.panoptic, content)
        if self.instances is not None:
            things = [category for category in self.categories if category["isthing"]]
            files.write_json(self.instances, content | {"annotations": self.masks, "categories": things})


def png_folder(json_file: Path) -> Path:
    """Returns where the PNGs of a panoptic JSON are. Raises UserError for a file with another suffix."""
    if json_file.suffix != ".json":
        raise UserError(f"the name of {json_file} must end in .json")
    return json_file.with_suffix("")
