"""Training as people train: frozen parts, batches in parts, the best weights, an early end, and scaled schedules."""

import json
import logging
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage
from programs import TRAIN_NET, load, one_line
from runs import arguments, train_net, write_own_data
from small import options

from kmax_d2.checkpoint.class_rows import OF_CLASSES, take_rows
from kmax_d2.engine import Trainer, setup
from kmax_d2.engine.diagnosis import memory_advice
from kmax_d2.engine.writers import Progress, tracker
from kmax_d2.errors import UserError


@pytest.fixture(scope="module")
def own_data(tmp_path_factory):
    return write_own_data(tmp_path_factory.mktemp("own"))


def trainer_for(own_data, output, tests=True, **changes):
    args = arguments(own_data, OUTPUT_DIR=str(output), **{"SOLVER__MAX_ITER": 2} | changes)
    args.test_data = args.test_data if tests else None
    return Trainer(setup(args))


@pytest.mark.parametrize("parts", [["backbone"], ["backbone", "pixel_decoder"]])
def test_frozen_parts_stay_what_they_are_through_evaluations(own_data, tmp_path, parts):
    trainer = trainer_for(own_data, tmp_path, SOLVER__FREEZE=parts, TEST__EVAL_PERIOD=1)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    changed = {name.partition(".")[0] for name, x in trainer.model.state_dict().items() if not x.equal(before[name])}
    assert changed == {"backbone", "pixel_decoder", "transformer_decoder", "semantic_head"} - set(parts)
    with pytest.raises(UserError, match="FREEZE or LAYER_DECAY was another one"):
        trainer_for(own_data, tmp_path).resume_or_load(resume=True)


def test_nothing_left_to_learn(own_data, tmp_path):
    everything = ["backbone", "pixel_decoder", "transformer_decoder", "semantic_head"]
    with pytest.raises(UserError, match="leaves nothing to learn"):
        trainer_for(own_data, tmp_path, SOLVER__FREEZE=everything)


def test_frozen_batch_norms_train_the_rest(own_data, tmp_path):
    first = trainer_for(own_data, tmp_path / "first")
    first.train()
    changes = {"MODEL__KMAX__NORM": "FrozenBN", "MODEL__WEIGHTS": str(tmp_path / "first" / "model_final.pth")}
    second = trainer_for(own_data, tmp_path / "second", **changes)
    second.resume_or_load(resume=False)
    second.train()
    old, new = first.model.state_dict(), second.model.state_dict()
    assert all(old[name].equal(new[name]) for name in old if name.endswith(("running_mean", "norm.weight")))
    assert not old["backbone.stem.conv.weight"].equal(new["backbone.stem.conv.weight"])


def test_parts_of_a_batch_add_up_to_its_gradient(own_data, tmp_path):
    """With every pixel sampled and no dropout, as each part draws its own, and without the statistics of a batch."""
    gradients = []
    for parts in (1, 2):
        changes = {"MODEL__KMAX__NORM": "FrozenBN", "MODEL__KMAX__LOSS__NUM_SAMPLES": 10000, "SOLVER__MAX_ITER": 1}
        changes |= {"MODEL__KMAX__TRANSFORMER_DECODER__DROP_PATH": 0.0, "SOLVER__IMS_PER_BATCH": 4}
        torch.manual_seed(0)
        trainer = trainer_for(own_data, tmp_path / str(parts), tests=False, SOLVER__ACCUMULATE=parts, **changes)
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            elif type(module).__name__ == "FrozenBatchNorm2d":
                module.weight.fill_(0.5)  # a gain of 0 blocks all gradients
        trainer.train()
        assert trainer._trainer.samples == 4
        gradients.append({name: weight.grad for name, weight in trainer.model.named_parameters()})
    assert sum(bool(gradient.any()) for gradient in gradients[0].values()) > 100
    for name, gradient in gradients[0].items():
        close = 1e-4 * float(gradient.abs().max()) + 1e-7
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=close, msg=name)


class Scores(HookBase):
    """Puts given metrics in place of those of the evaluations, of which each iteration has one."""

    def __init__(self, values):
        self.values = values

    def after_step(self):
        value = self.values[self.trainer.iter]
        self.trainer.storage.put_scalars(**{"score": value, "ema/score": value})


def scored(own_data, output, values, iterations, **changes):
    """Trains with a score for each iteration, resuming what the folder has; returns the iterations that were done."""
    changes |= {"SOLVER__BEST_METRIC": "score", "TEST__EVAL_PERIOD": 1, "SOLVER__CHECKPOINT_PERIOD": 1}
    changes |= {"SOLVER__KEEP_CHECKPOINTS": 1, "SOLVER__MAX_ITER": iterations}
    trainer = trainer_for(own_data, output, tests=False, **changes)
    trainer.register_hooks([Scores(values)])
    trainer._hooks.insert(0, trainer._hooks.pop())
    trainer.resume_or_load(resume=True)
    trainer.train()
    return [step for _, step in trainer.storage.history("total_loss").values()] if trainer.storage.histories() else []


def load_best(folder):
    return torch.load(folder / "model_best.pth", weights_only=True)


def test_the_best_weights_are_kept_and_a_resumed_run_knows_them(own_data, tmp_path):
    values = [3.0, 5.0, 4.0, 4.5, 6.0]
    scored(own_data, tmp_path, values, 3)
    best = load_best(tmp_path)
    assert (best["iteration"], best["score"]) == (1, 5.0)
    assert scored(own_data, tmp_path, values, 4) == [3]
    assert load_best(tmp_path)["iteration"] == 1  # 4.5 is no better, though it is the best of the second run
    assert scored(own_data, tmp_path, values, 5) == [4]
    final = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert load_best(tmp_path)["score"] == 6.0
    assert all(value.equal(final["model"][name]) for name, value in load_best(tmp_path)["model"].items())


def test_patience_ends_a_run_and_the_resumed_one(own_data, tmp_path):
    values = [3.0, 5.0, math.nan, 4.0, 6.0, 7.0, 8.0]
    changes = {"SOLVER__PATIENCE": 2, "SOLVER__EMA__ENABLED": True}
    done = scored(own_data, tmp_path, values, 7, **changes)
    assert done == [0, 1, 2, 3]
    for name in ("model_final.pth", "model_final_ema.pth", "model_best.pth"):
        assert (tmp_path / name).is_file()
    assert scored(own_data, tmp_path, values, 7, **changes) == []
    assert scored(own_data, tmp_path, values, 7, **changes | {"SOLVER__PATIENCE": 3})[0] == 4


def test_a_schedule_is_scaled_with_the_batch(own_data, tmp_path):
    args = arguments(own_data, OUTPUT_DIR=str(tmp_path), SOLVER__IMS_PER_BATCH=64, SOLVER__BASE_LR=0.8)
    args.opts += ["SOLVER.MAX_ITER", 1000, "SOLVER.WARMUP_ITERS", 100, "SOLVER.EMA.DECAY", 0.9]
    args.scale_schedule = 16
    solver = setup(args).SOLVER
    assert (solver.IMS_PER_BATCH, solver.MAX_ITER, solver.WARMUP_ITERS) == (16, 4000, 400)
    assert pytest.approx(0.2) == solver.BASE_LR
    assert pytest.approx(0.9) == solver.EMA.DECAY**4
    args.scale_schedule = 0
    with pytest.raises(UserError, match="--scale-schedule is 0"):
        setup(args)


def test_the_command_line():
    args = load(TRAIN_NET).parse_args(["--freeze", "backbone,pixel_decoder", "--scale-schedule", "4", "SEED", "3"])
    assert args.opts == ["SOLVER.FREEZE", ["backbone", "pixel_decoder"], "SEED", "3"]
    assert args.scale_schedule == 4


def test_memory_that_runs_out_names_what_needs_less(own_data, tmp_path):
    cfg = setup(arguments(own_data, OUTPUT_DIR=str(tmp_path), SOLVER__AMP__ENABLED=True))
    line = memory_advice(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), cfg)
    assert line.startswith("not enough memory for 2 images of 65×65 at once; what needs less: SOLVER.ACCUMULATE 2 (")
    assert "CHECKPOINT_BLOCKS" in line and "AMP" not in line
    assert memory_advice(RuntimeError("shapes do not fit"), cfg) == ""


def test_evaluations_draw_pictures_for_tensorboard(own_data, tmp_path):
    trainer = trainer_for(own_data, tmp_path, TEST__PICTURES=2)
    with EventStorage() as trainer.storage:
        trainer._draw()
        (name, picture, _), (other, *_) = trainer.storage._vis_data
    assert name != other and name.startswith("predictions/")
    assert picture.shape[0] == 3 and picture.dtype.name == "uint8" and picture.std() > 10


def test_trackers(own_data, tmp_path, monkeypatch):
    cfg = setup(arguments(own_data, OUTPUT_DIR=str(tmp_path), SOLVER__TRACKERS=["wandb"]))
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert one_line(Trainer, cfg) == "error: SOLVER.TRACKERS has wandb, which is not installed: pip install wandb"
    logged = []
    run = types.SimpleNamespace(log=lambda metrics, step: logged.append((step, metrics)), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **options: run))
    with EventStorage(3) as storage:
        writer = tracker("wandb", cfg)
        storage.put_scalar("loss", 1.5)
        writer.write()
        writer.write()
    assert logged == [(3, {"loss": 1.5})]


def test_the_line_of_a_run(caplog):
    with EventStorage(19) as storage, caplog.at_level(logging.INFO):
        storage.put_scalars(time=0.5, lr=0.001, total_loss=9.0, loss_instance=1.0, loss_instance_3=7.0)
        Progress(100, 8).write()
    assert "iteration 20 of 100: total_loss 9, loss_instance 1; lr 0.001; 16 images/s, 0:00:40 left, " in caplog.text
    assert storage.latest()["images_per_second"][0] == 16


def head(classes, first):
    """Class heads of so many classes, whose rows are numbered from `first`; the semantic one has no void."""
    rows = first + torch.arange(classes + 1.0)
    return {"d.class_head.weight": rows[:, None].repeat(1, 3), "semantic_head.classifier.bias": rows[:-1]}


COCO = MetadataCatalog.get("coco_2017_val_panoptic").stuff_classes


@pytest.mark.parametrize(
    ("names", "own_names", "expected"),
    [
        (["Car", "sky-other-merged", "tree"], ["sky", "dog", "car, auto"], [1, 101, 0, 3]),
        (["a", "b"], ["c", "d"], [100, 101, 102]),  # as many, but others
        (["a", "b"], ["a", "b"], [0, 1, 2]),
        (COCO, ["person", "kite", "moon"], [0, 33, 102, 133]),
        ([], [], None),
    ],
)
def test_rows_of_class_heads_go_to_the_classes_of_the_same_names(names, own_names, expected):
    weights, own = head(len(names) or 133, 0), head(len(own_names), 100)
    take_rows(weights, names, own, own_names)
    if expected is not None:
        assert weights["d.class_head.weight"][:, 1].tolist() == expected
        assert weights["semantic_head.classifier.bias"].tolist() == expected[:-1]


def test_a_checkpoint_of_other_classes_starts_a_training(own_data, tmp_path, caplog):
    trainer_for(own_data, tmp_path / "first", tests=False, SOLVER__MAX_ITER=1).train()
    content = json.loads(Path(own_data["train"][2]).read_text())
    names = [category["name"] for category in content["categories"]]
    for index, category in enumerate(content["categories"]):
        category["name"] = names[1] if index == 1 else f"new {category['name']}"
    file = tmp_path / "other.json"
    file.write_text(json.dumps(content))
    other = {"train": [*own_data["train"][:2], str(file)], "val": None}
    weights = str(tmp_path / "first" / "model_final.pth")
    trainer = trainer_for(other, tmp_path / "second", tests=False, MODEL__WEIGHTS=weights)
    before = trainer.model.transformer_decoder.predictor.class_head.weight.clone()
    with caplog.at_level(logging.INFO):
        trainer.resume_or_load(resume=False)
    assert f"take over 1 of {len(names)} classes ({names[1]})" in caplog.text
    old = torch.load(weights, weights_only=True)["model"]
    now = trainer.model.state_dict()
    name = "transformer_decoder.predictor.class_head.weight"
    same = [bool(now[name][row].equal(old[name][row])) for row in range(len(names) + 1)]
    assert same == [row in (1, len(names)) for row in range(len(names) + 1)]
    assert now[name][0].equal(before[0])
    assert all(now[n].equal(old[n]) for n in old if not OF_CLASSES.fullmatch(n))


def test_test_data_are_looked_at_before_an_evaluation(own_data, tmp_path):
    content = json.loads(Path(own_data["val"][2]).read_text())
    content["images"][1]["width"] = 7
    (tmp_path / "broken.json").write_text(json.dumps(content))
    files = ["--test-data", *own_data["val"][:2], str(tmp_path / "broken.json")]
    changes = options(OUTPUT_DIR=tmp_path / "out", MODEL__WEIGHTS="missing.pth", MODEL__KMAX__NUM_CLASSES=0)
    with pytest.raises(UserError, match="broken cannot be used"):
        load(TRAIN_NET).main(["--eval-only", *files, *map(str, changes)])


@pytest.mark.slow
def test_processes_add_up_the_parts_too(own_data, tmp_path):
    moments = []
    for parts in (1, 2):
        changes = {"MODEL__KMAX__NORM": "FrozenBN", "MODEL__KMAX__LOSS__NUM_SAMPLES": 10000, "SOLVER__MAX_ITER": 1}
        changes |= {"MODEL__KMAX__TRANSFORMER_DECODER__DROP_PATH": 0.0, "MODEL__KMAX__LOSS__SEMANTIC_WEIGHT": 0.0}
        changes |= {"SOLVER__IMS_PER_BATCH": 4, "SOLVER__ACCUMULATE": parts, "SOLVER__FREEZE": ["pixel_decoder"]}
        run = train_net(tmp_path / str(parts), own_data, "--num-gpus", "2", **changes)
        assert run.returncode == 0, run.stderr
        saved = torch.load(tmp_path / str(parts) / "model_final.pth", weights_only=True)
        state = saved["trainer"]["_trainer"]["optimizer"]["state"]
        moments.append([state[key]["exp_avg"] for key in sorted(state)])
        assert saved["trainer"]["_trainer"]["samples"] == 4
    assert sum(bool(moment.any()) for moment in moments[0]) > 50
    for one, two in zip(*moments, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4 * float(one.abs().max()) + 1e-8)
