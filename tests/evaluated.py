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
    """What a model that is right gives for a record; that of a spoilt one is :func:`disturbed`."""
    ids, classes, segments = truth_of(name, record)
    if spoil:
        seed = [*str(record["image_id"]).encode()]
        return output(name, *disturbed(ids, classes, segments, seed, len(MetadataCatalog.get(name).stuff_classes)))
    return output(name, ids, classes, segments)


def disturbed(ids, classes, segments, seed, num_classes):
    """Shifts all, drops, splits, merges, and relabels segments, and adds void and a segment over others, at random."""
    rng = np.random.default_rng(seed)
    shift = tuple(rng.integers(-2, 3, 2))
    ids, classes = (np.roll(values, shift, (0, 1)).astype(np.int64) for values in (ids, classes))
    height, width = ids.shape
    result = []
    for number, segment in enumerate(segments, start=1):
        mask, chance, category = ids == segment["id"], rng.random(), segment["category_id"]
        if chance < 0.1:  # dropped
            ids[mask] = 0
            continue
        if chance < 0.2:  # the right part becomes another segment
            columns = np.flatnonzero(mask.any(0))
            ids[mask & (np.arange(width) > columns[int(len(columns) * rng.uniform(0.3, 0.9))])] = -number
            result.append({"id": -number, "category_id": category})
        elif chance < 0.3 and result:  # joins another one
            ids[mask] = result[-1]["id"]
            continue
        elif chance < 0.4:
            category = int(rng.integers(num_classes))
        result.append({"id": segment["id"], "category_id": category})
    for value in (0, 1 << 24):  # void, and a segment that is invented
        top, left = int(rng.integers(height - height // 6)), int(rng.integers(width - width // 6))
        ids[top : top + height // 6, left : left + width // 6] = value
    result.append({"id": 1 << 24, "category_id": int(rng.integers(num_classes))})
    result = [segment for segment in result if (ids == segment["id"]).any()]
    for segment in result:
        classes[ids == segment["id"]] = segment["category_id"]
    return ids, classes, result


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
