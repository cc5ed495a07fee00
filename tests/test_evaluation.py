"""Evaluation by options, and of unusual datasets."""

import json

import numpy as np
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
    assert np.isnan(results["PQ_st"])


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
