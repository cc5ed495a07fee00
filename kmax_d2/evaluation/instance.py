"""Evaluates instance AP by COCO's protocol, on instance annotations or on the things of panoptic ones."""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import BoxMode
from detectron2.utils import comm
from pycocotools.cocoeval import COCOeval

from ..data import panoptic_png
from ..data.datasets.coco_panoptic import things_of
from ..files import write_json
from ..parallel import parallel_map
from .rle import encode_masks

logger = logging.getLogger(__name__)


class InstanceEvaluator(COCOEvaluator):
    """Detectron2's COCO evaluator of masks, except that it encodes them on the device where they are.

    The truth is in the dataset's own instance annotations if they are on disk, or else in its segments. COCO's own are
    the official ones: their masks may overlap. The results in COCO's format are written to `output_dir`.
    """

    def __init__(self, dataset_name: str, output_dir: str):
        metadata = MetadataCatalog.get(dataset_name)
        file = metadata.get("json_file")
        category_ids = {index: id_ for id_, index in metadata.thing_dataset_id_to_contiguous_id.items()}
        if file is None or not os.path.isfile(file):
            if file is not None:
                logger.warning("%s is not on disk: AP uses the things of the panoptic annotations instead", file)
            file = os.path.join(output_dir, "instances_gt.json")
            category_ids = {index: index for index in category_ids}
            if comm.is_main_process():
                write_json(Path(file), panoptic_to_instances(dataset_name))
            comm.synchronize()
        # The evaluator names categories in the order of their ids.
        names = [metadata.thing_classes[index] for index in sorted(category_ids, key=category_ids.__getitem__)]
        name = f"{dataset_name}_instances"
        MetadataCatalog.pop(name, None)
        MetadataCatalog.get(name).set(json_file=file, thing_classes=names)
        super().__init__(name, tasks=("segm",), output_dir=output_dir, use_fast_impl=False)
        self._category_ids = category_ids

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Encodes results; an output's "instances" has masks, boxes, scores, and contiguous classes."""
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

    def _derive_coco_results(self, coco_eval: COCOeval | None, *args: Any, **kwargs: Any) -> dict[str, float]:
        results = super()._derive_coco_results(coco_eval, *args, **kwargs)
        has_truth = any(not annotation.get("iscrowd", 0) for annotation in self._coco_api.anns.values())
        return dict.fromkeys(results, 0.0) if coco_eval is None and has_truth else results  # nothing is predicted


def instances_of(record: dict) -> tuple[dict, list[dict]]:
    """Returns COCO's entries of a record's image and segments, with contiguous classes and no annotation ids."""
    ids = panoptic_png.read(record["pan_seg_file_name"])
    annotations = []
    for segment in record["segments_info"]:
        mask = mask_util.encode(np.asfortranarray(ids == segment["id"], dtype=np.uint8))
        if not mask_util.area(mask):
            continue
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
    return {"id": record["image_id"], "height": ids.shape[0], "width": ids.shape[1]}, annotations


def panoptic_to_instances(dataset_name: str) -> dict:
    """Converts a dataset's things to a COCO instance annotation with contiguous class ids, in memory."""
    metadata = MetadataCatalog.get(dataset_name)
    things = sorted(things_of(metadata))
    records = [
        record | {"segments_info": [s for s in record["segments_info"] if s["category_id"] in things]}
        for record in DatasetCatalog.get(dataset_name)
    ]
    found = parallel_map(instances_of, records, "true instances")
    annotations = [annotation for _, of_image in found for annotation in of_image]
    return {
        "info": {},
        "images": [image for image, _ in found],
        "annotations": [annotation | {"id": index} for index, annotation in enumerate(annotations, start=1)],
        "categories": [{"id": index, "name": metadata.thing_classes[index]} for index in things],
    }
