"""Evaluation by options, and of unusual datasets."""

import csv
import json
import logging

import pytest
from detectron2.data import DatasetCatalog
from evaluated import evaluate, output_of
from small import options

from kmax_d2.data.datasets import coco_panoptic, shapes
from kmax_d2.engine import Trainer, load_config, ready_config
from kmax_d2.errors import UserError
from kmax_d2.evaluation import build_evaluator

NAME = "evaluated_shapes_of_a_user"


@pytest.fixture
def dataset(tmp_path):
    """A folder with two images, the JSON's content, and a function that registers them with a changed one."""
    shapes.write_split(tmp_path, "val", 2, 11)
    json_file = tmp_path / "panoptic_val.json"

    def register(content, **metadata):
        json_file.write_text(json.dumps(content))
        places = (str(tmp_path / name) for name in ("val", "panoptic_val", "panoptic_val.json"))
        coco_panoptic.register(NAME, *places, **metadata)

    content = json.loads(json_file.read_text())
    register(content)
    return tmp_path, content, register


def evaluate_truth(folder, saved=""):
    return evaluate(NAME, folder, lambda record: output_of(NAME, record), saved)["panoptic_seg"]


def test_only_the_results_that_are_on_are_evaluated(dataset, tmp_path):
    cfg = load_config("", ["MODEL.KMAX.TEST.INSTANCE_ON", False, "MODEL.KMAX.TEST.SEMANTIC_ON", False])
    evaluator = build_evaluator(cfg, NAME, str(tmp_path))
    evaluator.reset()
    for record in DatasetCatalog.get(NAME):
        evaluator.process([record], [output_of(NAME, record)])
    assert list(evaluator.evaluate()) == ["panoptic_seg"]


def test_a_dataset_of_things_alone_without_areas(dataset):
    folder, content, register = dataset
    for annotation in content["annotations"]:
        annotation["segments_info"] = [
            {key: s[key] for key in ("id", "category_id")} for s in annotation["segments_info"]
        ]
    register(content | {"categories": [category | {"isthing": 1} for category in content["categories"]]})
    results = evaluate_truth(folder)
    assert results["PQ"] == results["PQ_th"] == pytest.approx(100)
    assert "PQ_st" not in results


@pytest.mark.parametrize("isthing", [0, 1])
def test_the_files_of_an_evaluation(dataset, caplog, isthing):
    """Things alone and stuff alone, of which one image is missed; the last class does not occur."""
    folder, content, register = dataset
    caplog.set_level(logging.INFO, "kmax_d2")
    names = [category["name"] for category in content["categories"]]
    categories = [category | {"isthing": isthing} for category in content["categories"]]
    register(content | {"categories": [*categories, {"id": 99, "name": "unseen", "isthing": isthing}]})

    def outputs(record):
        right = output_of(NAME, record)
        return right if record["image_id"] else right | {"panoptic_seg": (0 * right["panoptic_seg"][0], [])}

    results = evaluate(NAME, folder / "inference", outputs)
    with open(folder / "inference" / "classes.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert json.loads((folder / "inference" / "results.json").read_text()) == results
    ours = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("kmax_d2"))
    assert "nan" not in ours.lower() and ("segm" in results) == bool(isthing)
    assert [row["class"] for row in rows] == [*names, "unseen"]
    assert list(rows[-1].values()) == ["unseen", ["stuff", "thing"][isthing], "", "", "", "0", "0", "0", ""]
    segments = {annotation["image_id"]: annotation["segments_info"] for annotation in content["annotations"]}
    for row, category in zip(rows, categories, strict=False):
        missed, found = (sum(s["category_id"] == category["id"] for s in segments[i]) for i in (0, 1))
        assert (row["TP"], row["FP"], row["FN"]) == (str(found), "0", str(missed))
        if missed + found:
            assert float(row["PQ"]) == pytest.approx(100 * found / (found + missed / 2))
            assert float(row["IoU"]) == pytest.approx(100)
    logged = [line.split()[1] for line in ours.partition("best first")[2].splitlines()[3:]]
    found = {row["class"]: float(row["PQ"]) for row in rows if row["PQ"]}
    assert logged == sorted(found, key=lambda name: -found[name])


def test_what_cannot_be_evaluated_is_not_trained_either(dataset, tmp_path):
    _, content, register = dataset
    register(content, evaluator_type="lvis")
    sets = {f"DATASETS__{split}": (NAME,) for split in ("TRAIN", "TEST")}
    sets["MODEL__KMAX__NUM_CLASSES"] = 0  # those of the dataset
    trainer = Trainer(ready_config("", options(**sets, OUTPUT_DIR=str(tmp_path / "output"))))
    with pytest.raises(UserError, match=f"there is no evaluator for {NAME}, whose evaluator_type is lvis"):
        trainer.train()


def test_two_images_of_one_name_cannot_be_saved(dataset):
    folder, content, register = dataset
    (folder / "val" / "more").mkdir()
    (folder / "val" / "0001.jpg").rename(folder / "val" / "more" / "0000.jpg")
    content["images"][1]["file_name"] = "more/0000.jpg"
    register(content)
    assert evaluate_truth(folder)["PQ"] == pytest.approx(100)
    with pytest.raises(UserError, match=r"two images of .* have the name 0000: to save"):
        evaluate_truth(folder, folder / "saved")
