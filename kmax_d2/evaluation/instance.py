"""Instance AP of a panoptic dataset: its things, as COCO instances."""

from __future__ import annotations

import json
import os

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, MetadataCatalog, detection_utils
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm
from panopticapi.utils import rgb2id


def panoptic_to_instances(dataset_name: str) -> dict:
    """The dataset's things as a COCO instance annotation with contiguous class ids, in memory."""
    metadata = MetadataCatalog.get(dataset_name)
    things = sorted(metadata.thing_dataset_id_to_contiguous_id.values())
    images, annotations = [], []
    for record in DatasetCatalog.get(dataset_name):
        images.append({key: record[key] for key in ("height", "width")} | {"id": record["image_id"]})
        ids = rgb2id(detection_utils.read_image(record["pan_seg_file_name"], "RGB"))
        for segment in record["segments_info"]:
            if not segment["isthing"]:
                continue
            mask = mask_util.encode(np.asfortranarray(ids == segment["id"], dtype=np.uint8))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": record["image_id"],
                    "category_id": segment["category_id"],
                    "iscrowd": segment.get("iscrowd", 0),
                    "area": int(mask_util.area(mask)),
                    "bbox": mask_util.toBbox(mask).tolist(),
                    "segmentation": mask | {"counts": mask["counts"].decode()},
                }
            )
    categories = [{"id": index, "name": metadata.thing_classes[index]} for index in things]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def instance_evaluator(dataset_name: str, output_dir: str) -> COCOEvaluator:
    """Detectron2's COCO evaluator on the things of a panoptic dataset, for masks with contiguous classes."""
    name = f"{dataset_name}_instances"
    file = os.path.join(output_dir, "instances_gt.json")
    if comm.is_main_process():
        content = panoptic_to_instances(dataset_name)
        os.makedirs(output_dir, exist_ok=True)
        with open(file, "w") as stream:
            json.dump(content, stream)
    comm.synchronize()
    # Without a map of dataset ids, the evaluator takes classes as they are.
    MetadataCatalog.pop(name, None)
    things = MetadataCatalog.get(dataset_name).thing_dataset_id_to_contiguous_id.values()
    names = MetadataCatalog.get(dataset_name).thing_classes
    MetadataCatalog.get(name).set(json_file=file, thing_classes=[names[index] for index in sorted(things)])
    return COCOEvaluator(name, tasks=("segm",), output_dir=output_dir, use_fast_impl=False)
