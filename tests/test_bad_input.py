"""Every fault of the user's is one line that says what is wrong."""

import argparse
import json
import shutil
from pathlib import Path

import programs
import pytest
import torch
from PIL import Image
from small import options

from kmax_d2.checkpoint import load_weights
from kmax_d2.data import PanopticTrainMapper
from kmax_d2.data.datasets import coco_panoptic, shapes
from kmax_d2.engine import Trainer, load_config, setup
from kmax_d2.errors import UserError


@pytest.fixture
def data(tmp_path):
    shapes.write_split(tmp_path, "val", 2, 5)
    return [str(tmp_path / "val"), str(tmp_path / "panoptic_val"), str(tmp_path / "panoptic_val.json")]


def arguments(config_file="", opts=(), data=None):
    return argparse.Namespace(config_file=config_file, opts=list(opts), train_data=data, test_data=data)


def load(data):
    images, pngs, json_file = data
    return coco_panoptic.load(json_file, images, pngs)


def test_missing_config_names_the_nearest():
    with pytest.raises(UserError, match=r"no config file configs/coco/r5\.yaml - did you mean coco/r50\?"):
        load_config("configs/coco/r5.yaml")


def test_config_is_found_by_its_name_too():
    assert load_config("coco/r50").dump() == load_config(str(programs.ROOT / "configs/coco/r50.yaml")).dump()


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


def pop(*path):
    """A function that removes what stands at a path of a JSON."""

    def change(content):
        for part in path[:-1]:
            content = content[part]
        content.pop(path[-1])

    return change


def other_category(content):
    content["annotations"][1]["segments_info"][0]["category_id"] = 77


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pop("categories"), r"panoptic_val\.json is not in COCO panoptic format: it has no categories"),
        (pop("categories", 2, "isthing"), r"panoptic_val\.json: the category .* has no valid isthing"),
        (other_category, r"a segment of 0001\.png has category 77, which its categories do not define"),
        (None, r"panoptic_val\.json is not valid JSON"),
    ],
)
def test_annotations_that_are_no_panoptic_json(data, change, message):
    content = json.loads(Path(data[2]).read_text())
    if change:
        change(content)
    Path(data[2]).write_text(json.dumps(content) if change else "{")
    with pytest.raises(UserError, match=message):
        load(data)


def test_annotations_without_their_files(tmp_path, data):
    shutil.rmtree(data[1])
    with pytest.raises(UserError, match=r"2 of 2 panoptic PNGs of .* are missing, first .*0000\.png"):
        load(data)
    Path(data[0], "0001.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 2 images of .* are missing, first .*0001\.jpg"):
        load(data)
    data[2] = str(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"cannot read the panoptic annotations .*none\.json"):
        load(data)


def test_number_of_classes_that_contradicts_the_dataset():
    opts = ["DATASETS.TRAIN", "('shapes_train',)", "MODEL.KMAX.NUM_CLASSES"]
    with pytest.raises(UserError, match=r"NUM_CLASSES is 5, but shapes_train has 9 classes"):
        setup(arguments(opts=[*opts, 5]))
    assert setup(arguments(opts=[*opts, 0])).MODEL.KMAX.NUM_CLASSES == 9


def test_own_data_give_the_number_of_classes(data):
    assert setup(arguments("coco/r50", data=data)).MODEL.KMAX.NUM_CLASSES == 9
    with pytest.raises(UserError, match=r"NUM_CLASSES is 5, but your data have 9 classes"):
        setup(arguments("coco/r50", ["MODEL.KMAX.NUM_CLASSES", "5"], data))


@pytest.mark.parametrize("kind", ["file_name", "pan_seg_file_name"])
def test_files_that_cannot_be_read_are_named(data, kind):
    record = load(data)[0]
    file, mapper = Path(record[kind]), PanopticTrainMapper(load_config("", options()))
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(UserError, match=rf"cannot read .*{file.name}"):
        mapper(record)
    Image.new("RGB", (10, 20)).save(file)
    message = (
        r"0000\.png is 10×20, but its image is" if "seg" in kind else r"0000\.jpg is 10×20 .*, but its record says"
    )
    with pytest.raises(UserError, match=message):
        mapper(record)


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


def assert_one_line(done, line):
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {line}")
    assert "Traceback" not in done.stderr + done.stdout


def test_command_line_prints_one_line_and_leaves_with_a_status():
    done = programs.run(programs.TRAIN_NET, "--config-file", "coco/r50", "SOLVER.BASELR", "1")
    assert_one_line(done, "no option SOLVER.BASELR - did you mean SOLVER.BASE_LR?")


def test_a_broken_image_in_training_is_one_line_too(data, tmp_path):
    file = Path(data[0], "0001.jpg")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    opts = options(OUTPUT_DIR=tmp_path, SOLVER__MAX_ITER=2, DATALOADER__NUM_WORKERS=1)
    done = programs.run(programs.TRAIN_NET, "--train-data", *data, "--test-data", *data, *opts)
    assert_one_line(done, "cannot read the image")
