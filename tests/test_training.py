"""The real trainer on a real small dataset: through the command line, on one process and on two."""

import json
import logging
import math
import re
import resource
from pathlib import Path

import pytest
import torch
from detectron2.utils.events import EventStorage, JSONWriter
from runs import arguments, train_net, write_own_data
from small import options

from kmax_d2.engine import Trainer, load_config, setup
from kmax_d2.engine.optimizer import build_lr_scheduler, build_optimizer
from kmax_d2.engine.writers import OptionalWriter
from kmax_d2.errors import UserError

TERMS = ["loss_pq_class", "loss_pq_mask", "loss_mask_id", "loss_instance"]
LOSSES = TERMS + [f"{term}_{index}" for term in TERMS for index in range(6)] + ["loss_semantic"]


@pytest.fixture(scope="session")
def own_data(tmp_path_factory):
    return write_own_data(tmp_path_factory.mktemp("own"))


def metrics(output):
    """Returns the last value of each metric that the run wrote."""
    latest = {}
    for line in (Path(output) / "metrics.json").read_text().splitlines():
        latest |= json.loads(line)
    return latest


@pytest.fixture(scope="module")
def trained(own_data, tmp_path_factory):
    """A finished run of four iterations with an evaluation."""
    output = tmp_path_factory.mktemp("run")
    changes = {"SOLVER__MAX_ITER": 4, "SOLVER__CHECKPOINT_PERIOD": 2, "TEST__EVAL_PERIOD": 4}
    run = train_net(output, own_data, **changes, MODEL__DEVICE="cuda")
    assert run.returncode == 0, run.stderr
    return output, run


def test_a_run_logs_every_loss_and_all_results_of_one_model(trained):
    output, run = trained
    assert ("no GPU found: running on the CPU" in run.stdout) == (not torch.cuda.is_available())
    last = metrics(output)
    assert all(math.isfinite(last[name]) for name in LOSSES)
    assert {"panoptic_seg/PQ", "panoptic_seg/SQ_th", "panoptic_seg/RQ_st", "sem_seg/mIoU"} <= set(last)
    assert list(Path(output).glob("events.out.tfevents.*"))
    assert (output / "model_0000001.pth").is_file()
    assert (output / "model_final.pth").is_file()


def test_two_processes_train_and_evaluate_as_one_does(own_data, tmp_path):
    run = train_net(
        tmp_path, own_data, "--num-gpus", "2", "--dist-url", "auto", SOLVER__MAX_ITER=2, TEST__EVAL_PERIOD=2
    )
    assert run.returncode == 0, run.stderr
    assert "World size: 2" in run.stdout
    both = metrics(tmp_path)
    weights = tmp_path / "model_final.pth"
    alone = tmp_path / "alone"
    run = train_net(alone, own_data, "--eval-only", MODEL__WEIGHTS=weights)
    assert run.returncode == 0, run.stderr
    miou = re.search(r"'mIoU': (?:np\.float64\()?([\d.e-]+)", run.stdout)  # as Detectron2 logs it with NumPy 1 or 2
    assert float(miou[1]) == pytest.approx(both["sem_seg/mIoU"], abs=1e-9)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_trains(own_data, tmp_path, precision):
    changes = {"SOLVER__AMP__ENABLED": True, "SOLVER__AMP__PRECISION": precision, "SOLVER__MAX_ITER": 2}
    trainer = Trainer(setup(arguments(own_data, OUTPUT_DIR=str(tmp_path), **changes)))
    before = trainer.model.pixel_decoder.stages[3][0].conv2.conv.weight.clone()
    trainer.train()
    after = trainer.model.pixel_decoder.stages[3][0].conv2.conv.weight
    assert after.dtype == torch.float32
    assert after.isfinite().all()
    assert math.isfinite(trainer.storage.history("total_loss").latest())
    if precision == "bfloat16":  # float16 may skip the first steps to find its scale
        assert not torch.equal(before, after)


def test_a_loss_that_is_not_finite_stops_the_run_before_it_reaches_the_weights(own_data, tmp_path):
    def trainer_for(iterations):
        changes = {"OUTPUT_DIR": str(tmp_path), "SOLVER__MAX_ITER": iterations, "SOLVER__CHECKPOINT_PERIOD": 1}
        return Trainer(setup(arguments(own_data, **changes)))

    trainer_for(1).train()
    kept = torch.load(tmp_path / "model_final.pth", map_location="cpu", weights_only=True)["model"]
    trainer = trainer_for(3)
    trainer.resume_or_load(resume=True)
    with torch.no_grad():
        trainer.model.transformer_decoder.predictor.class_head.bias[0] = math.inf
    weight = trainer.model.backbone.stem.conv.weight.clone()
    with pytest.raises(UserError, match=r"iteration 1: loss_pq_class = .*images: .*\.jpg.* Try ") as failure:
        trainer.train()
    assert "loss_mask_id" not in str(failure.value)
    assert "not finite is that of transformer_decoder.predictor.class_head (Linear); images" in str(failure.value)
    assert torch.equal(trainer.model.backbone.stem.conv.weight, weight)
    again = torch.load(tmp_path / "model_final.pth", map_location="cpu", weights_only=True)["model"]
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_reaches_the_weights(own_data, tmp_path):
    trainer = Trainer(setup(arguments(own_data, OUTPUT_DIR=str(tmp_path), SOLVER__MAX_ITER=1)))
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.model.backbone.stem.conv.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(
        UserError, match=r"0: norm of the gradient = (nan|inf); .*gradient that of backbone\.stem\.conv"
    ):
        trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.named_parameters())
    assert not list(tmp_path.glob("*.pth"))


def test_a_failed_save_leaves_the_earlier_checkpoint(own_data, tmp_path):
    trainer = Trainer(setup(arguments(own_data, OUTPUT_DIR=str(tmp_path))))
    trainer.iter = 0
    trainer.checkpointer.save("model_final", iteration=0)
    kept = (tmp_path / "model_final.pth").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) // 2, limit[1]))  # as a full disk: writing fails halfway
    try:
        with pytest.raises(UserError, match=r"cannot write .*model_final\.pth: .*it needs [1-9]\d* kB"):
            trainer.checkpointer.save("model_final", iteration=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    with torch.no_grad():
        trainer.model.backbone.stem.conv.weight[0] = math.nan
    with pytest.raises(UserError, match="the weights are no longer finite, so they were not saved"):
        trainer.checkpointer.save("model_final", iteration=1)
    assert (tmp_path / "model_final.pth").read_bytes() == kept
    assert sorted(file.name for file in tmp_path.iterdir() if "events" not in file.name) == [
        "last_checkpoint",
        "metrics.json",
        "model_final.pth",
    ]


def test_training_goes_on_without_a_log_that_fails(caplog):
    writer = OptionalWriter(JSONWriter("/dev/full"))
    with EventStorage() as storage, caplog.at_level(logging.WARNING):
        storage.put_scalar("loss", 1.0)
        storage.step()
        writer.write()
        writer.write()
        writer.close()
    assert caplog.text.count("training goes on without it") == 1


def test_decay_is_on_kernels_alone_and_the_backbone_learns_slower():
    cfg = load_config("", options(MODEL__KMAX__NUM_CLASSES=3, MODEL__KMAX__NORM="BN", SOLVER__BASE_LR=0.01))
    model = Trainer.build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.add(name)
            kernel = parameter.ndim > 1 and not name.endswith(("_positions", ".centers"))
            assert group["weight_decay"] == (0.05 if kernel else 0.0), name
            assert group["lr"] == pytest.approx(0.001 if name.startswith("backbone.") else 0.01), name
            assert group["betas"] == (0.9, 0.999)
            assert group["eps"] == 1e-7
    assert seen == set(names.values())


def test_schedule_warms_up_to_the_base_rate_and_decays_by_the_global_step():
    cfg = load_config("", ["SOLVER.MAX_ITER", 1000, "SOLVER.WARMUP_ITERS", 100])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_lr_scheduler(cfg, optimizer)
    rates = []
    for _ in range(1000):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[0] == 0.0
    assert rates[50] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.99)
    for step in (100, 500, 999):
        assert rates[step] == pytest.approx((1 - step / 1000) ** 0.9)
