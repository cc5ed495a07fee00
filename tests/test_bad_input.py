"""Every fault of the user's is one line that says what is wrong."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from small import options

from kmax_d2.checkpoint import load_weights
from kmax_d2.data import PanopticTrainMapper
from kmax_d2.data.datasets import coco_panoptic, shapes
from kmax_d2.engine import Trainer, load_config, setup
from kmax_d2.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def data(tmp_path):
    shapes.write_split(tmp_path, "val", 2, 5)
    return [str(tmp_path / "val"), str(tmp_path / "panoptic_val"), str(tmp_path / "panoptic_val.json")]


def arguments(config_file="", opts=(), data=None):
    return argparse.Namespace(config_file=config_file, opts=list(opts), train_data=data, test_data=data)


def load(data):
    images, pngs, json_file = data
    return coco_panoptic.load(json_file, images, pngs)


def rewrite(data, change):
    content = json.loads(Path(data[2]).read_text())
    change(content)
    Path(data[2]).write_text(json.dumps(content))


def test_missing_config_names_the_nearest():
    with pytest.raises(UserError, match=r"no config file configs/coco/r5\.yaml - did you mean coco/r50\?"):
        load_config("configs/coco/r5.yaml")


def test_config_is_found_by_its_name_too():
    assert load_config("coco/r50").dump() == load_config(str(ROOT / "configs/coco/r50.yaml")).dump()


def test_broken_config(tmp_path):
    file = tmp_path / "broken.yaml"
    file.write_text("MODEL: [1, 2")
    with pytest.raises(UserError, match=r"broken\.yaml is not valid YAML"):
        load_config(str(file))


def test_misspelt_option_in_a_config(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("MODEL:\n  KMAX:\n    LOSS:\n      MASK_IDWEIGHT: 1.0\n")
    with pytest.raises(UserError, match=r"MASK_IDWEIGHT - did you mean MODEL\.KMAX\.LOSS\.MASK_ID_WEIGHT\?"):
        load_config(str(file))


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["SOLVER.BASELR", "1"], r"no option SOLVER\.BASELR - did you mean SOLVER\.BASE_LR\?"),
        (["MODEL.KMAX.NUM_QUERIES", "8"], r"no option MODEL\.KMAX\.NUM_QUERIES - did you mean "),
        (["SOLVER.BASE_LR"], r"options come in pairs .* SOLVER\.BASE_LR is alone"),
        (["SOLVER.MAX_ITER", "many"], r"value that does not fit: .*many"),
    ],
)
def test_options(opts, message):
    with pytest.raises(UserError, match=message):
        load_config("", opts)


def test_unregistered_dataset_names_the_nearest():
    opts = ["DATASETS.TRAIN", "('shapes_trian',)"]
    with pytest.raises(UserError, match=r"no dataset shapes_trian is registered - did you mean shapes_train\?"):
        setup(arguments(opts=opts))


def test_absent_dataset_folder(tmp_path, data):
    data[0] = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        setup(arguments(data=data))


def test_builtin_dataset_that_is_not_on_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"coco_2017_train_panoptic .*panoptic_train2017\.json.*DETECTRON2_DATASETS"):
        Trainer(setup(arguments("coco/r50", options(OUTPUT_DIR=str(tmp_path)))))


def test_annotations_that_are_missing_or_no_panoptic_json(tmp_path, data):
    with pytest.raises(UserError, match=r"cannot read the panoptic annotations .*none\.json"):
        coco_panoptic.load(str(tmp_path / "none.json"), data[0], data[1])
    rewrite(data, lambda content: content.pop("categories"))
    with pytest.raises(UserError, match=r"panoptic_val\.json is not in COCO panoptic format: it has no categories"):
        load(data)
    Path(data[2]).write_text("{")
    with pytest.raises(UserError, match=r"panoptic_val\.json is not valid JSON"):
        load(data)


def test_annotations_without_their_pngs(data):
    shutil.rmtree(data[1])
    with pytest.raises(UserError, match=r"2 of 2 panoptic PNGs of .* are missing, first .*0000\.png"):
        load(data)


def test_annotations_without_an_image(data):
    Path(data[0], "0001.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 2 images of .* are missing, first .*0001\.jpg"):
        load(data)


def test_category_that_is_not_defined(data):
    rewrite(data, lambda content: content["annotations"][1]["segments_info"][0].update(category_id=77))
    with pytest.raises(UserError, match=r"a segment of 0001\.png has category 77, which its categories do not define"):
        load(data)


def test_category_without_its_kind(data):
    rewrite(data, lambda content: content["categories"][2].pop("isthing"))
    with pytest.raises(UserError, match=r"panoptic_val\.json: the category .* has no isthing"):
        load(data)


def test_number_of_classes_that_contradicts_the_dataset():
    opts = ["DATASETS.TRAIN", "('shapes_train',)", "MODEL.KMAX.NUM_CLASSES"]
    with pytest.raises(UserError, match=r"NUM_CLASSES is 5, but shapes_train has 9 classes"):
        setup(arguments(opts=[*opts, 5]))
    assert setup(arguments(opts=[*opts, 0])).MODEL.KMAX.NUM_CLASSES == 9


def test_own_data_give_the_number_of_classes(data):
    assert setup(arguments("coco/r50", data=data)).MODEL.KMAX.NUM_CLASSES == 9


@pytest.mark.parametrize("kind", ["file_name", "pan_seg_file_name"])
def test_files_that_cannot_be_read_are_named(data, kind):
    record = load(data)[0]
    file = Path(record[kind])
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(UserError, match=rf"cannot read .*{file.name}"):
        PanopticTrainMapper(load_config("", options()))(record)


def test_png_of_another_size_than_its_image(data):
    record = load(data)[0]
    Image.new("RGB", (10, 20)).save(record["pan_seg_file_name"])
    with pytest.raises(UserError, match=r"0000\.png is 10×20, but its image is"):
        PanopticTrainMapper(load_config("", options()))(record)


def test_weights_to_start_from_that_cannot_be_had(tmp_path, data, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    opts = options(MODEL__WEIGHTS="http://127.0.0.1:9/imagenet.tar.gz", OUTPUT_DIR=str(tmp_path / "out"))
    trainer = Trainer(setup(arguments(opts=opts, data=data)))
    with pytest.raises(UserError, match=r"cannot download .*imagenet\.tar\.gz .* train from scratch"):
        trainer.resume_or_load(resume=False)
    (tmp_path / "out" / "last_checkpoint").write_text("model_final.pth")  # now it is that file that is missing
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read, neither model_final\.pth"):
        trainer.resume_or_load(resume=True)


def test_checkpoints_that_do_not_fit(tmp_path):
    model = Trainer.build_model(load_config("", options(MODEL__KMAX__NUM_CLASSES=3, MODEL__KMAX__NORM="BN")))
    with pytest.raises(UserError, match=r"no checkpoint .*none\.pth"):
        load_weights(model, str(tmp_path / "none.pth"))
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"broken\.pth is not a readable checkpoint"):
        load_weights(model, str(broken))
    other = tmp_path / "other.pth"
    torch.save({"model": {"fc.weight": torch.zeros(3)}}, other)
    with pytest.raises(UserError, match="is for another model: none of its weights fit"):
        load_weights(model, str(other))
    fewer = Trainer.build_model(load_config("", options(MODEL__KMAX__NUM_CLASSES=2, MODEL__KMAX__NORM="BN")))
    torch.save({"model": fewer.state_dict()}, other)
    with pytest.raises(UserError, match=r"14 of \d+ weights do not fit, e\.g\. .*class_head.*"):
        load_weights(model, str(other))
    torch.save({"model": model.state_dict()}, other)
    load_weights(model, str(other))


def test_command_line_prints_one_line_and_leaves_with_a_status():
    command = [sys.executable, str(ROOT / "train_net.py"), "--config-file", "coco/r50", "SOLVER.BASELR", "1"]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 1
    assert run.stderr.strip().splitlines()[-1] == "error: no option SOLVER.BASELR - did you mean SOLVER.BASE_LR?"
    assert "Traceback" not in run.stderr


def test_a_broken_image_in_training_is_one_line_too(data, tmp_path):
    for file in Path(data[0]).iterdir():
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    opts = options(OUTPUT_DIR=tmp_path, SOLVER__MAX_ITER=2, DATALOADER__NUM_WORKERS=1)
    command = [sys.executable, str(ROOT / "train_net.py"), "--train-data", *data, "--test-data", *data]
    run = subprocess.run(
        [*command, *map(str, opts)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert run.returncode == 1
    assert "error: cannot read the image" in run.stderr.strip().splitlines()[-1]
    assert "Traceback" not in run.stderr + run.stdout
