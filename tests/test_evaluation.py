"""The evaluators agree with panopticapi and with what a perfect and a spoilt prediction must score."""

import contextlib
import io
import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from evaluated import evaluate, output_of
from panopticapi.evaluation import pq_compute
from PIL import Image

from kmax_d2.data.datasets import coco_panoptic, shapes
from kmax_d2.data.segment_ids import id2rgb
from kmax_d2.engine import load_config
from kmax_d2.errors import UserError
from kmax_d2.evaluation import build_evaluator

NAME = "evaluated_shapes"
NUM_CLASSES = len(shapes.CATEGORIES)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    shapes.write_split(folder, "val", 5, 11)
    coco_panoptic.register(NAME, str(folder / "val"), str(folder / "panoptic_val"), str(folder / "panoptic_val.json"))
    return folder


def test_a_right_prediction_scores_100_everywhere(dataset, tmp_path):
    results = evaluate(NAME, tmp_path, lambda record: output_of(NAME, record))
    for name in ("PQ", "SQ", "RQ", "PQ_th", "PQ_st"):
        assert results["panoptic_seg"][name] == pytest.approx(100)
    assert results["segm"]["AP"] == pytest.approx(100)
    assert results["sem_seg"]["mIoU"] == pytest.approx(100)


def test_a_spoilt_prediction_scores_what_panopticapi_and_counting_say(dataset, tmp_path):
    results = evaluate(NAME, tmp_path / "ours", lambda record: output_of(NAME, record, spoil=True))
    content = json.loads((dataset / "panoptic_val.json").read_text())
    annotations, confusion = [], np.zeros((NUM_CLASSES, NUM_CLASSES))
    for record in DatasetCatalog.get(NAME):
        output = output_of(NAME, record, spoil=True)
        segment_ids, info = output["panoptic_seg"]
        name = record["pan_seg_file_name"].rsplit("/", 1)[-1]
        Image.fromarray(id2rgb(segment_ids.numpy())).save(tmp_path / name)
        ids = {index: category["id"] for index, category in enumerate(content["categories"])}
        info = [{"id": s["id"], "category_id": ids[s["category_id"]]} for s in info]
        annotations.append({"image_id": record["image_id"], "file_name": name, "segments_info": info})
        truth = output_of(NAME, record)["sem_seg"].argmax(0)
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
        evaluator.process([record], [output_of(NAME, record)])
    assert list(evaluator.evaluate()) == ["panoptic_seg"]


def test_a_dataset_of_things_alone_and_one_without_areas(tmp_path):
    shapes.write_split(tmp_path, "val", 2, 11)
    json_file = tmp_path / "panoptic_val.json"
    content = json.loads(json_file.read_text())
    content["categories"] = [category | {"isthing": 1} for category in content["categories"]]
    json_file.write_text(json.dumps(content))
    place = str(tmp_path / "val"), str(tmp_path / "panoptic_val"), str(json_file)
    coco_panoptic.register("things_alone", *place)
    results = evaluate("things_alone", tmp_path, lambda record: output_of("things_alone", record))["panoptic_seg"]
    assert results["PQ"] == results["PQ_th"] == pytest.approx(100)
    assert np.isnan(results["PQ_st"])
    del content["annotations"][1]["segments_info"][0]["area"]
    json_file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"panoptic_val\.json: a segment of 0001\.png has no area, which PQ needs"):
        evaluate("things_alone", tmp_path, lambda record: output_of("things_alone", record))


def test_two_images_of_one_name_cannot_be_saved(tmp_path):
    shapes.write_split(tmp_path, "val", 2, 11)
    json_file = tmp_path / "panoptic_val.json"
    content = json.loads(json_file.read_text())
    (tmp_path / "val" / "more").mkdir()
    (tmp_path / "val" / "0001.jpg").rename(tmp_path / "val" / "more" / "0000.jpg")
    content["images"][1]["file_name"] = "more/0000.jpg"
    json_file.write_text(json.dumps(content))
    place = str(tmp_path / "val"), str(tmp_path / "panoptic_val"), str(json_file)
    coco_panoptic.register("same_names", *place)
    results = evaluate("same_names", tmp_path, lambda record: output_of("same_names", record))
    assert results["panoptic_seg"]["PQ"] == pytest.approx(100)
    with pytest.raises(UserError, match=r"two images of .* have the name 0000: to save"):
        evaluate("same_names", tmp_path, lambda record: output_of("same_names", record), tmp_path / "saved")
