"""Outputs of models that are right or wrong by design, and their evaluation."""

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from PIL import Image
from torchvision.ops import masks_to_boxes

from kmax_d2.data.segment_ids import rgb2id
from kmax_d2.engine import load_config
from kmax_d2.evaluation import build_evaluator
from kmax_d2.evaluation.semantic import annotated_classes, segment_classes


def truth_of(name, record):
    """(H, W) segment ids and classes, -1 for void, and the segments that are no crowds."""
    ids = rgb2id(np.asarray(Image.open(record["pan_seg_file_name"])))
    classes = segment_classes(record["pan_seg_file_name"], record["segments_info"], -1)
    if name == "ade20k_panoptic_val":
        file = record["pan_seg_file_name"].replace("ade20k_panoptic_val", "annotations/validation")
        classes = annotated_classes(file, -1)
    return ids, classes, [segment for segment in record["segments_info"] if not segment.get("iscrowd")]


def output_of(name, record, spoil=False):
    """What a model that is right gives for a record; a spoilt one misses a segment and shifts everything else."""
    ids, classes, segments = truth_of(name, record)
    if spoil:
        return output(name, np.roll(ids, 3, axis=1), np.roll(classes, 3, axis=1), segments[:-1])
    return output(name, ids, classes, segments)


def output(name, ids, classes, segments):
    """The output with these ids and classes, -1 for any, (H, W), and segments."""
    metadata = MetadataCatalog.get(name)
    things = set(metadata.thing_dataset_id_to_contiguous_id.values())
    segment_ids = np.zeros(ids.shape, np.int32)
    info = []
    for index, segment in enumerate(segments, start=1):
        segment_ids[ids == segment["id"]] = index
        category = segment["category_id"]
        info.append({"id": index, "category_id": category, "isthing": category in things})
    found = [segment for segment in segments if segment["category_id"] in things]
    masks = torch.from_numpy(np.array([ids == s["id"] for s in found], dtype=bool).reshape(-1, *ids.shape))
    boxes = masks_to_boxes(masks)
    boxes[:, 2:] += 1
    instances = Instances(
        ids.shape,
        pred_masks=masks,
        pred_boxes=Boxes(boxes),
        scores=torch.linspace(0.875, 0.25, len(found)),
        pred_classes=torch.tensor([segment["category_id"] for segment in found]),
    )
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(classes).clamp(min=0), len(metadata.stuff_classes))
    return {
        "panoptic_seg": (torch.from_numpy(segment_ids), info),
        "sem_seg": one_hot.permute(2, 0, 1),
        "instances": instances,
    }


def evaluate(name, folder, outputs, saved=""):
    """The results of `outputs(record)` on this rank's share of the records, by Detectron2's interface."""
    evaluator = build_evaluator(load_config("", ["MODEL.KMAX.TEST.SAVE_PREDICTIONS", str(saved)]), name, str(folder))
    evaluator.reset()
    for record in DatasetCatalog.get(name)[comm.get_rank() :: comm.get_world_size()]:
        evaluator.process([record], [outputs(record)])
    return evaluator.evaluate()
