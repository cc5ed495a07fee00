"""What users of Detectron2 have on, choose, or mistype in a training: samplers, metrics, test sets, pictures."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.utils.events import EventStorage
from PIL import Image
from runs import arguments, write_own_data
from small import SMALL_MODEL, build

from kmax_d2.data import PanopticTestMapper
from kmax_d2.data.loading import build_seeded_loader, training_records
from kmax_d2.engine import Trainer, load_config, setup
from kmax_d2.errors import UserError
from kmax_d2.files import lock_folder
from kmax_d2.tools import quickstart
from kmax_d2.visualization import PANEL_SIDE, result_page


@pytest.fixture(scope="module")
def own_data(tmp_path_factory):
    return write_own_data(tmp_path_factory.mktemp("own"))


def train(own_data, output, **more):
    changes = {"OUTPUT_DIR": str(output), "SOLVER__MAX_ITER": 2, "TEST__EVAL_PERIOD": 1} | more
    cfg = setup(arguments(own_data, **changes))
    with EventStorage():
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=False)
        return trainer, trainer.train()


def test_the_small_model_differs_from_shipped_ones_only_in_sizes_and_counts():
    shipped = load_config("coco/r50")
    for name, value in SMALL_MODEL.items():
        default = shipped
        for part in name.split("."):
            default = default[part]
        if name in ("MODEL.DEVICE", "SEED"):
            continue
        values, defaults = (x if isinstance(x, list) else [x] for x in (value, default))
        assert len(values) == len(defaults)
        for small, large in zip(values, defaults, strict=True):
            # The quickstart reads images in the training process too; other tests train with workers.
            assert type(small) is type(large) is int and (0 < small <= large or name == "DATALOADER.NUM_WORKERS")


@pytest.mark.parametrize(
    "changes",
    [
        {"DATALOADER__SAMPLER_TRAIN": "RepeatFactorTrainingSampler", "DATALOADER__REPEAT_THRESHOLD": 0.9},
        {"DATALOADER__SAMPLER_TRAIN": "RandomSubsetTrainingSampler", "DATALOADER__RANDOM_SUBSET_RATIO": 0.5},
        {"DATALOADER__ASPECT_RATIO_GROUPING": True},
        {"DATALOADER__ASPECT_RATIO_GROUPING": True, "INPUT__COPY_PASTE": False, "DATALOADER__NUM_WORKERS": 1},
        {"INPUT__CROP_SIZE": [1, 1]},
    ],
)
def test_what_detectron2_offers_trains(changes, own_data, tmp_path):
    _, results = train(own_data, tmp_path, **changes)
    assert 0 <= results["panoptic_seg"]["PQ"] <= 100


def test_rare_classes_are_repeated(own_data):
    cfg = setup(arguments(own_data, DATALOADER__SAMPLER_TRAIN="RepeatFactorTrainingSampler"))
    cfg.defrost()
    cfg.DATALOADER.REPEAT_THRESHOLD = 1.0
    records = [{"segments_info": [{"category_id": int(index == 0)}], "index": index} for index in range(16)]
    loader = iter(build_seeded_loader(cfg, records, lambda record: record))
    drawn = [record["index"] for _ in range(100) for record in next(loader)]
    assert drawn.count(0) > 2.5 * np.mean([drawn.count(index) for index in range(1, 16)])  # the square root of 16


def test_a_subset_of_no_image_is_one_line(own_data, tmp_path):
    with pytest.raises(UserError, match="RANDOM_SUBSET_RATIO"):
        train(
            own_data,
            tmp_path,
            DATALOADER__SAMPLER_TRAIN="RandomSubsetTrainingSampler",
            DATALOADER__RANDOM_SUBSET_RATIO=0.01,
        )


def test_images_without_segments_are_left_out_if_asked(own_data, tmp_path):
    images, pngs, json_file = own_data["train"]
    content = json.loads(Path(json_file).read_text())
    content["annotations"][0]["segments_info"] = []
    (tmp_path / "train.json").write_text(json.dumps(content))
    cfg = setup(arguments({"train": [images, pngs, str(tmp_path / "train.json")], "val": own_data["val"]}))
    assert len(training_records(cfg.DATASETS.TRAIN, True)) == len(content["images"]) - 1
    assert len(training_records(cfg.DATASETS.TRAIN, False)) == len(content["images"])


def test_a_metric_that_does_not_exist_is_a_warning_with_those_that_do(own_data, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        train(own_data, tmp_path, SOLVER__BEST_METRIC="panoptic_seg/PP")
    assert "panoptic_seg/PP - did you mean panoptic_seg/PQ?" in caplog.text and "sem_seg/mIoU" in caplog.text
    assert not (tmp_path / "model_best.pth").exists()


def test_of_two_test_sets_the_first_one_decides(own_data, tmp_path, monkeypatch):
    cfg = setup(arguments(own_data, OUTPUT_DIR=str(tmp_path), SOLVER__MAX_ITER=1, TEST__EVAL_PERIOD=1))
    cfg.defrost()
    cfg.DATASETS.TEST = (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)
    with EventStorage():
        results = Trainer(cfg).train()
    assert list(results) == list(cfg.DATASETS.TEST)
    assert (tmp_path / "model_best.pth").exists()


def test_predictions_of_averaged_weights_are_kept_apart(own_data, tmp_path):
    saved = tmp_path / "saved"
    train(own_data, tmp_path / "run", SOLVER__EMA__ENABLED=True, MODEL__KMAX__TEST__SAVE_PREDICTIONS=str(saved))
    archives = sorted(file.relative_to(saved).parts[0] for file in saved.rglob("*.zip"))
    assert len(archives) == 2 and archives[0] == "ema"


def test_a_page_of_a_large_image_is_small(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    model = build("coco/base").eval()
    record = PanopticTestMapper(size=(65, 65))({"file_name": str(tmp_path / "a.png")})
    page = result_page(model, record, MetadataCatalog.get("coco_2017_val_panoptic"))
    assert max(page.shape) < 4 * PANEL_SIDE


@pytest.mark.parametrize("kind", ["PANOPTIC", "SEMANTIC", "INSTANCE"])
def test_pictures_are_of_the_results_that_are_on(kind, own_data, tmp_path):
    off = {f"MODEL__KMAX__TEST__{name}_ON": name == kind for name in ("PANOPTIC", "SEMANTIC", "INSTANCE")}
    trainer, _ = train(own_data, tmp_path, **off)
    assert trainer._draws  # no failure


def test_a_picture_that_fails_is_one_warning(own_data, tmp_path, caplog):
    class Undrawable(Trainer):
        @classmethod
        def build_model(cls, cfg):
            model = super().build_model(cfg)
            model.predict = None
            return model

    cfg = setup(arguments(own_data, OUTPUT_DIR=str(tmp_path), SOLVER__MAX_ITER=2, TEST__EVAL_PERIOD=1))
    with caplog.at_level(logging.WARNING), EventStorage():
        results = Undrawable(cfg).train()
    assert caplog.text.count("cannot draw predictions") == 1 and "PQ" in results["panoptic_seg"]


def test_a_run_removes_only_what_it_left_itself(tmp_path):
    kept = [".notes.partial.txt", ".notes.part", ".a.part.b.txt", ".model.12.parts", ".x.1.part.png"]
    left = ".model_final.4194300.part.pth"  # of a process that cannot exist
    for name in [*kept, left]:
        (tmp_path / name).write_text("")
    lock_folder(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {*kept, ".lock"}


def test_the_quickstart_does_not_start_over_an_earlier_run(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(UserError, match="has the results of an earlier run"):
        quickstart.main(["--output", str(tmp_path)])
    assert (tmp_path / "results.json").read_text() == "{}"


@pytest.mark.parametrize(
    "pair",
    [
        ("MODEL.DEVICE", "xpu"),
        ("MODEL.DEVICE", "mps"),
        ("SOLVER.POLY_POWER", 1e10),
        ("INPUT.SCALE_RANGE", [1e-9, 1.0]),
        ("INPUT.CROP_SIZE", [10**9, 10**9]),
        ("TEST.EXPECTED_RESULTS", [["panoptic_seg", "PQ", 40.0]]),
        ("TEST.EXPECTED_RESULTS", [["panoptic_seg", "PQ", "high", 1.0]]),
        ("TEST.EXPECTED_RESULTS", ["PQ"]),
    ],
)
def test_what_cannot_work_is_refused_before_the_training(pair):
    if torch.backends.mps.is_available() and pair[1] == "mps":
        return
    with pytest.raises(UserError, match=f"{pair[0]} is "):
        load_config("coco/r50", pair)
    load_config("coco/r50", ["TEST.EXPECTED_RESULTS", [["panoptic_seg", "PQ", 40.0, 0.5]]])
