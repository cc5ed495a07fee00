"""Instance AP by COCO's protocol: on the dataset's instance annotations, or on the things of its panoptic ones."""

from __future__ import annotations

import json
import logging
import os

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, MetadataCatalog, detection_utils
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import BoxMode
from detectron2.utils import comm
from panopticapi.utils import rgb2id

from ..parallel import parallel_map
from .rle import encode_masks

logger = logging.getLogger(__name__)


class InstanceEvaluator(COCOEvaluator):
    """Detectron2's COCO evaluator of masks, which encodes them where they are, on the GPU too.

    Args:
        dataset_name: with "json_file" and "thing_classes", the names of its categories, in its metadata.
        category_ids: those of the JSON, by contiguous class.
        output_dir: for the results in COCO's format.
    """

    def __init__(self, dataset_name: str, category_ids: dict[int, int], output_dir: str):
        super().__init__(dataset_name, tasks=("segm",), output_dir=output_dir, use_fast_impl=False)
        self._category_ids = category_ids

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Detectron2's interface; an output's "instances" has masks, boxes, scores and contiguous classes."""
        for record, output in zip(inputs, outputs, strict=True):
            found = output["instances"]
            boxes = BoxMode.convert(found.pred_boxes.tensor.cpu(), BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).tolist()
            parts = boxes, found.scores.tolist(), found.pred_classes.tolist(), encode_masks(found.pred_masks)
            instances = [
                {
                    "image_id": record["image_id"],
                    "category_id": self._category_ids[category],
                    "bbox": box,
                    "score": score,
                    "segmentation": rle,
                }
                for box, score, category, rle in zip(*parts, strict=True)
            ]
            self._predictions.append({"image_id": record["image_id"], "instances": instances})


def things_of(record: dict) -> tuple[dict, list[dict]]:
    """A record's image and its things in COCO's instance format, with contiguous classes and without annotation ids."""
    ids = rgb2id(detection_utils.read_image(record["pan_seg_file_name"], "RGB"))
    image = {"id": record["image_id"], "height": ids.shape[0], "width": ids.shape[1]}
    annotations = []
    for segment in record["segments_info"]:
        mask = mask_util.encode(np.asfortranarray(ids == segment["id"], dtype=np.uint8))
        annotations.append(
            {
                "image_id": record["image_id"],
                "category_id": segment["category_id"],
                "iscrowd": segment.get("iscrowd", 0),
                "area": int(mask_util.area(mask)),
                "bbox": mask_util.toBbox(mask).tolist(),
                "segmentation": mask | {"counts": mask["counts"].decode()},
            }
        )
    return image, annotations


def panoptic_to_instances(dataset_name: str) -> dict:
    """The dataset's things as a COCO instance annotation with contiguous class ids, in memory."""
    metadata = MetadataCatalog.get(dataset_name)
    things = sorted(metadata.thing_dataset_id_to_contiguous_id.values())
    records = [
        record | {"segments_info": [s for s in record["segments_info"] if s["category_id"] in things]}
        for record in DatasetCatalog.get(dataset_name)
    ]
    found = parallel_map(things_of, records, "instances of the ground truth")
    annotations = [annotation for _, of_image in found for annotation in of_image]
    return {
        "info": {},
        "images": [image for image, _ in found],
        "annotations": [annotation | {"id": index} for index, annotation in enumerate(annotations, start=1)],
        "categories": [{"id": index, "name": metadata.thing_classes[index]} for index in things],
    }


def instance_evaluator(dataset_name: str, output_dir: str) -> InstanceEvaluator:
    """AP on the dataset's own instance annotations, where its metadata name them and they are on disk.

    COCO's have them, with masks that overlap, and these are the official ones; else the things of the panoptic
    annotations serve.
    """
    metadata = MetadataCatalog.get(dataset_name)
    file = metadata.get("json_file")
    category_ids = {index: id_ for id_, index in metadata.thing_dataset_id_to_contiguous_id.items()}
    if file is None or not os.path.isfile(file):
        if file is not None:
            logger.warning("%s is not on disk: AP is on the things of the panoptic annotations instead", file)
        file = os.path.join(output_dir, "instances_gt.json")
        category_ids = {index: index for index in category_ids}
        if comm.is_main_process():
            content = panoptic_to_instances(dataset_name)
            os.makedirs(output_dir, exist_ok=True)
            with open(file, "w") as stream:
                json.dump(content, stream)
        comm.synchronize()
    # The evaluator names categories in the order of their ids, and without a map of ids it takes them as they are.
    names = [metadata.thing_classes[index] for index in sorted(category_ids, key=category_ids.get)]
    name = f"{dataset_name}_instances"
    MetadataCatalog.pop(name, None)
    MetadataCatalog.get(name).set(json_file=file, thing_classes=names)
    return InstanceEvaluator(name, category_ids, output_dir)
