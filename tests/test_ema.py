"""Averaged weights against averages computed by hand, through real training steps."""

import copy
import json

import pytest
import torch
from detectron2.engine import HookBase
from runs import arguments, train_net, write_own_data

from kmax_d2.engine import Trainer, setup
from kmax_d2.errors import UserError

EMA = {"SOLVER__EMA__ENABLED": True, "SOLVER__EMA__DECAY": 0.5, "SOLVER__EMA__WARMUP": False}


@pytest.fixture(scope="session")
def own_data(tmp_path_factory):
    return write_own_data(tmp_path_factory.mktemp("own"))


class Recorder(HookBase):
    """Keeps a copy of the weights after every step."""

    def __init__(self):
        self.weights = []

    def after_step(self):
        self.weights.append(copy.deepcopy(self.trainer.model.state_dict()))


def trainer_for(own_data, output, iterations, **changes):
    changes = EMA | {"OUTPUT_DIR": str(output), "SOLVER__MAX_ITER": iterations} | changes
    trainer = Trainer(setup(arguments(own_data, **changes)))
    recorder = Recorder()
    trainer.register_hooks([recorder])
    return trainer, recorder


def average(weights, decays):
    """Averages state dicts from first to last; each decay is what the average keeps where the next one comes in."""
    result = weights[0]
    for following, decay in zip(weights[1:], decays, strict=True):
        result = {
            name: decay * result[name] + (1 - decay) * value if value.is_floating_point() else value
            for name, value in following.items()
        }
    return result


def load(file):
    return torch.load(file, map_location="cpu", weights_only=True)


@pytest.mark.parametrize(
    ("changes", "decays"),
    [
        ({}, [0.5, 0.5]),
        ({"SOLVER__EMA__WARMUP": True}, [1 - 2 ** (-2 / 3), 0.5]),  # 1 - 3^(-2/3) is more than the decay
    ],
)
def test_weights_and_statistics_are_averaged_over_the_steps(own_data, tmp_path, changes, decays):
    trainer, recorder = trainer_for(own_data, tmp_path, 3, **changes)
    trainer.train()
    assert trainer.final_model is trainer.average.model
    expected = average(recorder.weights, decays)
    torch.testing.assert_close(dict(trainer.average.model.state_dict()), expected)
    torch.testing.assert_close(dict(load(tmp_path / "model_final_ema.pth")["model"]), expected)
    raw = load(tmp_path / "model_final.pth")["model"]
    torch.testing.assert_close(dict(raw), dict(recorder.weights[-1]))
    for name in ("backbone.stem.conv.weight", "backbone.stem.norm.running_mean"):
        assert not torch.equal(raw[name], expected[name])


def test_a_resumed_run_continues_the_average(own_data, tmp_path):
    first, _ = trainer_for(own_data, tmp_path, 2)
    first.train()
    kept = copy.deepcopy(first.average.model.state_dict())
    second, recorder = trainer_for(own_data, tmp_path, 4)
    second.resume_or_load(resume=True)
    torch.testing.assert_close(second.average.model.state_dict(), kept, rtol=0, atol=0)
    second.train()
    assert len(recorder.weights) == 2
    expected = average([kept, *recorder.weights], [0.5, 0.5])
    torch.testing.assert_close(dict(second.average.model.state_dict()), expected)


def test_an_average_enabled_later_starts_at_the_weights_of_the_checkpoint(own_data, tmp_path):
    first, before = trainer_for(own_data, tmp_path, 1, SOLVER__EMA__ENABLED=False)
    first.train()
    assert first.final_model is first.model
    assert not (tmp_path / "model_final_ema.pth").exists()
    second, after = trainer_for(own_data, tmp_path, 2)
    second.resume_or_load(resume=True)
    second.train()
    expected = average([*before.weights, *after.weights], [0.5])
    torch.testing.assert_close(dict(second.average.model.state_dict()), expected)


def test_averaged_weights_are_evaluated_beside_the_raw_ones(own_data, tmp_path):
    trainer, _ = trainer_for(own_data, tmp_path, 2)

    class Sabotage(HookBase):
        """Makes the averaged model unlike the raw one before both are evaluated: every query is void."""

        def after_train(self):
            trainer.average.model.transformer_decoder.predictor.class_head.bias[-1] = 1e4

    trainer.register_hooks([Sabotage()])
    trainer._hooks.insert(0, trainer._hooks.pop())
    results = trainer.train()
    alone = Trainer.test(trainer.cfg, trainer.average.model)
    assert results["ema/sem_seg"] == pytest.approx(alone["sem_seg"], nan_ok=True)
    assert results["ema/panoptic_seg"]["PQ"] == 0
    assert set(results) == {name for task in alone for name in (task, f"ema/{task}")}
    raw = Trainer.test(trainer.cfg, trainer.model)
    assert results["sem_seg"] == pytest.approx(raw["sem_seg"], nan_ok=True)
    assert results["sem_seg"]["mIoU"] != results["ema/sem_seg"]["mIoU"]
    logged = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()][-1]
    assert logged["sem_seg/mIoU"] == pytest.approx(results["sem_seg"]["mIoU"])
    assert logged["ema/sem_seg/mIoU"] == pytest.approx(results["ema/sem_seg"]["mIoU"])


def test_the_average_is_of_the_plain_model_where_blocks_are_checkpointed(own_data, tmp_path):
    trainer, recorder = trainer_for(own_data, tmp_path, 2, MODEL__KMAX__CHECKPOINT_BLOCKS=True)
    trainer.train()
    torch.testing.assert_close(dict(trainer.average.model.state_dict()), average(recorder.weights, [0.5]))
    plain = Trainer.build_model(setup(arguments(own_data))).eval()
    plain.load_state_dict(trainer.average.model.state_dict())
    image = torch.rand(3, 65, 65, generator=torch.Generator().manual_seed(0)) * 255
    batch = [{"image": image, "height": 65, "width": 65}]
    with torch.no_grad():
        got, want = (model(batch)[0]["sem_seg"] for model in (trainer.average.model, plain))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_command_line_trains_and_evaluates_averaged_weights(own_data, tmp_path, processes):
    run = train_net(
        *(tmp_path, own_data, "--num-gpus", str(processes), "--dist-url", "auto"),
        **(EMA | {"SOLVER__MAX_ITER": 2, "SOLVER__CHECKPOINT_PERIOD": 1}),
    )
    assert run.returncode == 0, run.stderr
    steps = [load(tmp_path / name)["model"] for name in ("model_0000000.pth", "model_final.pth")]
    averaged = load(tmp_path / "model_final_ema.pth")["model"]
    torch.testing.assert_close(dict(averaged), average(steps, [0.5]))
    logged = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()][-1]

    weights = str(tmp_path / "model_final_ema.pth")
    cfg = setup(arguments(own_data, OUTPUT_DIR=str(tmp_path / "again"), MODEL__WEIGHTS=weights))
    model = Trainer.build_model(cfg)
    model.load_state_dict(averaged)
    assert Trainer.test(cfg, model)["sem_seg"]["mIoU"] == pytest.approx(logged["ema/sem_seg/mIoU"], abs=1e-6)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_outside_its_range_is_refused(own_data, tmp_path, decay):
    with pytest.raises(UserError, match=r"SOLVER\.EMA\.DECAY"):
        trainer_for(own_data, tmp_path, 1, SOLVER__EMA__DECAY=decay)
