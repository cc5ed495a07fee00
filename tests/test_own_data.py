"""A user's own data, given as files: their names, classes, and what a config's other datasets become."""

import json
import logging
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from runs import arguments, write_own_data
from small import options

from kmax_d2.data import panoptic_png
from kmax_d2.engine import Trainer, ready_config, setup
from kmax_d2.errors import UserError


@pytest.fixture
def own_data(tmp_path):
    return write_own_data(tmp_path)


def test_sets_with_the_same_file_name_stay_apart(own_data, tmp_path):
    files = {}
    for split in ("train", "val"):
        images, pngs, json_file = own_data[split]
        files[split] = [images, pngs, str(tmp_path / split.upper() / "labels" / "panoptic.json")]
        (tmp_path / split.upper() / "labels").mkdir(parents=True)
        shutil.copy(json_file, files[split][2])
    cfg = ready_config("", options(DATASETS__OWN_TRAIN=files["train"], DATASETS__OWN_TEST=files["val"]))
    (train,), (test,) = cfg.DATASETS.TRAIN, cfg.DATASETS.TEST
    assert train == "labels_panoptic" and test != train
    assert [len(DatasetCatalog.get(name)) for name in (train, test)] == [6, 4]


def test_test_images_among_the_training_images_are_reported(own_data, caplog):
    with caplog.at_level(logging.WARNING):
        ready_config("", options(DATASETS__OWN_TRAIN=own_data["train"], DATASETS__OWN_TEST=own_data["train"]))
    assert "6 test images are also training images, such as 0000.jpg" in caplog.text


@pytest.mark.parametrize(("own", "other"), [("TRAIN", "TEST"), ("TEST", "TRAIN")])
def test_a_configs_other_datasets_stay_if_they_have_the_same_classes(own_data, own, other, caplog):
    files = {f"DATASETS__OWN_{own}": own_data["train"]}
    cfg = ready_config("", options(**files, **{f"DATASETS__{other}": ("shapes_val",)}))
    assert cfg.DATASETS[other] == ("shapes_val",)
    cfg = ready_config("", options(**files, **{f"DATASETS__{other}": ("coco_2017_val_panoptic",)}))
    assert cfg.DATASETS[other] == () and cfg.MODEL.KMAX.NUM_CLASSES == 9
    assert f"DATASETS.{other} is left out" in caplog.text


def test_things_must_agree_between_training_and_test(own_data):
    content = json.loads(Path(own_data["val"][2]).read_text())
    content["categories"][0]["isthing"] ^= 1
    Path(own_data["val"][2]).write_text(json.dumps(content))
    with pytest.raises(UserError, match="have different classes"):
        ready_config("", options(DATASETS__OWN_TRAIN=own_data["train"], DATASETS__OWN_TEST=own_data["val"]))


@pytest.mark.parametrize("kind", ["things", "stuff"])
def test_a_dataset_of_one_kind_trains_and_evaluates(own_data, tmp_path, kind):
    """No result is nan: what the dataset lacks is left out. With these thresholds even this model finds something."""
    for _, pngs, json_file in own_data.values():
        content = json.loads(Path(json_file).read_text())
        content["categories"] = [c for c in content["categories"] if bool(c["isthing"]) == (kind == "things")]
        kept = {category["id"] for category in content["categories"]}
        for annotation in content["annotations"]:
            ids = panoptic_png.read(str(Path(pngs, annotation["file_name"])))
            annotation["segments_info"] = [s for s in annotation["segments_info"] if s["category_id"] in kept]
            ids[~np.isin(ids, [segment["id"] for segment in annotation["segments_info"]])] = 0
            panoptic_png.write(Path(pngs, annotation["file_name"]), ids, {})
        Path(json_file).write_text(json.dumps(content))
    test = {f"MODEL__KMAX__TEST__{name}": 0 for name in ("THING_AREA_LIMIT", "STUFF_AREA_LIMIT")}
    test |= {f"MODEL__KMAX__TEST__{name}": 0.0 for name in ("THING_THRESHOLD", "STUFF_THRESHOLD")}
    test["MODEL__KMAX__TRANSFORMER_DECODER__NUM_QUERIES"] = 2
    changes = test | {"SOLVER__MAX_ITER": 2, "OUTPUT_DIR": str(tmp_path / "out")}
    trainer = Trainer(setup(arguments(own_data, **changes)))
    results = trainer.train()
    assert results["panoptic_seg"].keys() == {f"{m}{s}" for m in ("PQ", "SQ", "RQ") for s in ("", f"_{kind[:2]}")}
    assert ("segm" in results) == (kind == "things")
    assert math.isfinite(trainer.storage.history("total_loss").latest())
    assert all(math.isfinite(value) for name in ("panoptic_seg", "sem_seg") for value in results[name].values())
