"""Two processes train like one with the joint batch: the same losses and weights, except for rounding."""

import argparse
from unittest import mock

import pytest
import torch
from detectron2.utils import comm
from small import CITYSCAPES, options
from torch import nn

from kmax_d2.data.datasets import shapes
from kmax_d2.engine import Trainer, launch, setup
from kmax_d2.modeling.layers import BN_MOMENTUM

STEPS, IMAGES = 2, 2
SIDE = 65
# Models whose losses combine the images of a batch in different ways.
FORMS = {"coco": {}, "cityscapes": CITYSCAPES | {"MODEL__KMAX__LOSS__SMALL_INSTANCE_AREA": 300}}


def make_image(generator, masks):
    """A training sample of boxes on void, each drawn over the previous ones."""
    ids = torch.full((SIDE, SIDE), -1, dtype=torch.int16)
    for index in range(masks):
        top, left = torch.randint(0, SIDE - 30, (2,), generator=generator).tolist()
        ids[top : top + 30 - 5 * index, left : left + 30] = index
    return {
        "image": torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8, generator=generator),
        "segment_ids": ids,
        "segment_classes": torch.randint(0, len(shapes.CATEGORIES), (masks,), generator=generator),
    }


def make_batches():
    """One batch per step, of two images with different numbers of masks, one of them without any."""
    generator = torch.Generator().manual_seed(2)
    return [[make_image(generator, masks) for masks in batch] for batch in ((3, 0), (1, 5))]


class FixedTrainer(Trainer):
    """The real trainer on the same images in every run, deterministic and with all branches active."""

    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(module, nn.BatchNorm2d) and not module.weight.any():
                nn.init.constant_(module.weight, 0.5)  # a gain of 0 blocks all gradients
        return model.double()

    @classmethod
    def build_train_loader(cls, cfg):
        share = IMAGES // comm.get_world_size()
        first = comm.get_rank() * share
        return [batch[first : first + share] for batch in make_batches()]


def make_trainer(form, output):
    changes = {
        "DATASETS__TEST": (),
        "DATASETS__TRAIN": ("shapes_train",),
        "MODEL__KMAX__LOSS__NUM_SAMPLES": 10000,  # every pixel of a map
        "MODEL__KMAX__NORM": "SyncBN",
        "MODEL__KMAX__NUM_CLASSES": 0,
        "MODEL__KMAX__TRANSFORMER_DECODER__DROP_PATH": 0.0,
        "OUTPUT_DIR": str(output),
        "SOLVER__BASE_LR": 1e-3,
        "SOLVER__IMS_PER_BATCH": IMAGES,
        "SOLVER__MAX_ITER": STEPS,
        "SOLVER__WARMUP_ITERS": 0,
    }
    opts = options(**changes, **FORMS[form])
    # Each process starts from different weights; those of the first must reach all.
    torch.manual_seed(1 + comm.get_rank())
    return FixedTrainer(setup(argparse.Namespace(config_file="", opts=opts, train_data=None, test_data=None)))


def train(output):
    """Trains every form, in one of several processes or alone, and saves the results.

    Everything is in double precision, also what the model itself computes in float32: float32's rounding could move a
    pixel between two clusters.
    """
    torch.set_num_threads(1)
    results = {}
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        for form in FORMS:
            trainer = make_trainer(form, output)
            model = trainer.checkpointer.model
            counts = count_values(model)
            trainer.train()
            states = comm.gather({name: value.clone() for name, value in model.state_dict().items()})
            if comm.is_main_process():
                results[form] = {
                    "losses": {
                        name: torch.tensor([value for value, _ in history.values()], dtype=torch.float64)
                        for name, history in trainer.storage.histories().items()
                        if "loss" in name
                    },
                    "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
                    "states": states,
                    "counts": counts,
                }
    if comm.is_main_process():
        torch.save(results, output / f"{comm.get_world_size()}.pth")


def count_values(model):
    """Returns a dict that is filled when the model runs: how many values per channel each batch norm averages."""
    counts = {}

    def hook(name):
        def count(module, inputs, output):
            counts[name] = comm.get_world_size() * inputs[0].numel() // inputs[0].shape[1]

        return count

    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(hook(name))
    return counts


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What :func:`train` saves with one process and with two."""
    output = tmp_path_factory.mktemp("two_processes")
    train(output)
    launch(train, 2, dist_url="auto", args=(output,))
    return [torch.load(output / f"{count}.pth", weights_only=True) for count in (1, 2)]


@pytest.mark.parametrize("form", FORMS)
def test_two_processes_report_the_losses_of_the_joint_batch(runs, form):
    one, two = (run[form]["losses"] for run in runs)
    assert len(one["total_loss"]) == STEPS
    torch.testing.assert_close(two, one, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("form", FORMS)
def test_two_processes_update_the_weights_as_one_with_the_joint_batch(runs, form):
    one, two = (run[form] for run in runs)
    # Every part learns; some biases have no effect, hence no gradient.
    assert all(gradient.any() for name, gradient in one["gradients"].items() if not name.endswith("bias"))
    torch.testing.assert_close(two["gradients"], one["gradients"], rtol=1e-6, atol=1e-10)
    # AdamW amplifies small gradients: rounding of 1e-16 in place of 0 moves a weight by 1e-9 of the learning rate.
    weights = [{name: run["states"][0][name] for name in run["gradients"]} for run in (one, two)]
    torch.testing.assert_close(weights[1], weights[0], rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_both_processes_have_the_same_weights_and_statistics(runs, form):
    first, second = runs[1][form]["states"]
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_running_statistics_are_those_of_the_joint_batch(runs, form):
    one, two = (run[form] for run in runs)
    # Norms that one process fuses with the next step are not counted there.
    assert one["counts"].items() <= two["counts"].items()
    kept = (1 - BN_MOMENTUM) ** STEPS  # of the initial variance, 1
    for name, count in two["counts"].items():
        mean, var = ([run["states"][0][f"{name}.running_{part}"] for run in (one, two)] for part in ("mean", "var"))
        torch.testing.assert_close(mean[1], mean[0], rtol=1e-6, atol=1e-9)
        # One process divides by n - 1, as PyTorch does; Detectron2's synchronized norm divides by n.
        torch.testing.assert_close(var[1] - kept, (var[0] - kept) * (count - 1) / count, rtol=1e-6, atol=1e-9)
