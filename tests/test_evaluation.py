"""The evaluators agree with panopticapi and with what a perfect and a spoilt prediction must score."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances
from panopticapi.evaluation import pq_compute
from PIL import Image
from torchvision.ops import masks_to_boxes

from kmax_d2.data.datasets import coco_panoptic, shapes
from kmax_d2.data.segment_ids import id2rgb, rgb2id
from kmax_d2.engine import load_config
from kmax_d2.evaluation import build_evaluator

NAME = "evaluated_shapes"
NUM_CLASSES = len(shapes.CATEGORIES)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    shapes.write_split(folder, "val", 5, 11)
    coco_panoptic.register(NAME, str(folder / "val"), str(folder / "panoptic_val"), str(folder / "panoptic_val.json"))
    return folder


def output_of(record, spoil=False):
    """What a model that is right gives for a record; a spoilt one misses a thing and shifts everything else."""
    ids = rgb2id(np.asarray(Image.open(record["pan_seg_file_name"])))
    segments = record["segments_info"]
    if spoil:
        ids = np.roll(ids, 6, axis=1)
        segments = segments[1:]
    segment_ids = torch.zeros(ids.shape, dtype=torch.int32)
    classes = torch.zeros(ids.shape, dtype=torch.int64)
    info, masks, labels = [], [], []
    for index, segment in enumerate(segments, start=1):
        mask = torch.from_numpy(ids == segment["id"])
        segment_ids[mask] = index
        classes[mask] = segment["category_id"]
        info.append({"id": index, "category_id": segment["category_id"], "isthing": bool(segment["isthing"])})
        if segment["isthing"]:
            masks.append(mask)
            labels.append(segment["category_id"])
    masks = torch.stack(masks)
    instances = Instances(
        ids.shape,
        pred_masks=masks,
        pred_boxes=Boxes(masks_to_boxes(masks)),
        scores=torch.linspace(0.9, 0.8, len(masks)),
        pred_classes=torch.tensor(labels),
    )
    one_hot = torch.nn.functional.one_hot(classes, NUM_CLASSES).permute(2, 0, 1)
    return {"panoptic_seg": (segment_ids, info), "sem_seg": one_hot, "instances": instances}


def evaluate(output_dir, spoil):
    evaluator = build_evaluator(load_config(""), NAME, str(output_dir))
    evaluator.reset()
    for record in DatasetCatalog.get(NAME):
        evaluator.process([record], [output_of(record, spoil)])
    return evaluator.evaluate()


def test_a_right_prediction_scores_100_everywhere(dataset, tmp_path):
    results = evaluate(tmp_path, spoil=False)
    for name in ("PQ", "SQ", "RQ", "PQ_th", "PQ_st"):
        assert results["panoptic_seg"][name] == pytest.approx(100)
    assert results["segm"]["AP"] == pytest.approx(100)
    assert results["sem_seg"]["mIoU"] == pytest.approx(100)


def test_a_spoilt_prediction_scores_what_panopticapi_and_counting_say(dataset, tmp_path):
    results = evaluate(tmp_path / "ours", spoil=True)
    content = json.loads((dataset / "panoptic_val.json").read_text())
    annotations, confusion = [], np.zeros((NUM_CLASSES, NUM_CLASSES))
    for record in DatasetCatalog.get(NAME):
        output = output_of(record, spoil=True)
        segment_ids, info = output["panoptic_seg"]
        name = record["pan_seg_file_name"].rsplit("/", 1)[-1]
        Image.fromarray(id2rgb(segment_ids.numpy())).save(tmp_path / name)
        ids = {index: category["id"] for index, category in enumerate(content["categories"])}
        info = [{"id": s["id"], "category_id": ids[s["category_id"]]} for s in info]
        annotations.append({"image_id": record["image_id"], "file_name": name, "segments_info": info})
        truth = output_of(record)["sem_seg"].argmax(0)
        np.add.at(confusion, (truth.flatten(), output["sem_seg"].argmax(0).flatten()), 1)
    (tmp_path / "predictions.json").write_text(json.dumps(content | {"annotations": annotations}))
    with contextlib.redirect_stdout(io.StringIO()):
        expected = pq_compute(
            str(dataset / "panoptic_val.json"),
            str(tmp_path / "predictions.json"),
            str(dataset / "panoptic_val"),
            str(tmp_path),
        )
    assert 0 < expected["All"]["pq"] < 0.9
    assert results["panoptic_seg"]["PQ"] == pytest.approx(100 * expected["All"]["pq"])
    assert results["panoptic_seg"]["PQ_th"] == pytest.approx(100 * expected["Things"]["pq"])
    assert results["panoptic_seg"]["PQ_st"] == pytest.approx(100 * expected["Stuff"]["pq"])
    present = confusion.sum(1) > 0
    iou = confusion.diagonal() / (confusion.sum(0) + confusion.sum(1) - confusion.diagonal())
    assert results["sem_seg"]["mIoU"] == pytest.approx(100 * iou[present].mean())
    assert 0 < results["segm"]["AP"] < 90


def test_only_the_results_that_are_on_are_evaluated(dataset, tmp_path):
    cfg = load_config("", ["MODEL.KMAX.TEST.INSTANCE_ON", False, "MODEL.KMAX.TEST.SEMANTIC_ON", False])
    evaluator = build_evaluator(cfg, NAME, str(tmp_path))
    evaluator.reset()
    for record in DatasetCatalog.get(NAME):
        evaluator.process([record], [output_of(record)])
    assert list(evaluator.evaluate()) == ["panoptic_seg"]
