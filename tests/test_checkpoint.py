"""Activation checkpointing keeps less memory and changes nothing: losses, gradients and running statistics."""

from collections import Counter

import pytest
import torch
from saved_tensors import kept_bytes
from scenes import picture, sample
from small import build, randomize_norms
from torch import nn

from kmax_d2.modeling.axial_attention import AxialBlock
from kmax_d2.speed import checkpoint_blocks

BACKBONES = {
    "resnet": {"MODEL__KMAX__RESNET__BLOCKS": [1, 2, 1, 2]},
    "convnext": {
        "MODEL__BACKBONE__NAME": "KMaXConvNeXt",
        "MODEL__KMAX__CONVNEXT__DEPTHS": [1, 2, 1, 1],
        "MODEL__KMAX__CONVNEXT__WIDTHS": [8, 8, 16, 16],
        "MODEL__KMAX__CONVNEXT__DROP_PATH": 0.5,
    },
    "max_s": {
        "MODEL__BACKBONE__NAME": "KMaXMaXS",
        "MODEL__KMAX__MAXS__BLOCKS": [1, 1, 1, 2],
        "MODEL__KMAX__MAXS__WIDTHS": [8, 8, 16, 16],
        "MODEL__KMAX__MAXS__STEM_WIDTHS": [8, 8, 8],
        "MODEL__KMAX__MAXS__DROP_PATH": [0.0, 0.0, 0.5, 0.5],
    },
}
# The parts inside checkpointed blocks, by the start of their names.
RESNET_BLOCKS = (
    *("backbone.stage2.", "backbone.stage3.", "backbone.stage4.", "backbone.stage5."),
    *("pixel_decoder.stages.", "transformer_decoder.layers.", "transformer_decoder.predictor.", "semantic_head."),
)


@pytest.fixture
def every_size(monkeypatch):
    """Checkpoints blocks of any size: the images of the tests are small."""
    monkeypatch.setattr("kmax_d2.speed.checkpoint.SMALLEST", 0)


def small_model(**changes):
    torch.manual_seed(0)
    return randomize_norms(build(MODEL__KMAX__TRANSFORMER_DECODER__DROP_PATH=0.3, **changes))


def training_step(model):
    """Losses, gradients, buffers and the next random number of a step, the same random numbers drawn every time."""
    torch.manual_seed(5)
    losses = model([sample(65, 97, seed) for seed in range(2)])
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses, gradients, dict(model.named_buffers()), {"random": torch.rand(1)}


def count_calls(model):
    """Counts the forward passes of each convolution and linear map by name, from now on."""
    calls = Counter()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    return calls


@pytest.mark.parametrize("backbone", BACKBONES)
def test_training_step_equals_that_of_the_plain_model(every_size, backbone):
    """Also where paths are dropped, which both passes must drop alike."""
    expected = training_step(small_model(**BACKBONES[backbone]))
    ours = training_step(checkpoint_blocks(small_model(**BACKBONES[backbone])))
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            room = 1e-6 + 1e-4 * value.abs().max().item() if value.is_floating_point() else 0
            torch.testing.assert_close(mine[name], value, rtol=0, atol=room, msg=lambda text, name=name: name + text)
    assert len(expected[1]) == len(list(small_model(**BACKBONES[backbone]).parameters()))


def test_each_batch_counts_once_in_the_statistics(every_size):
    model = checkpoint_blocks(small_model())
    before = {name: value.clone() for name, value in model.named_buffers()}
    training_step(model)
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) > 50
    for name, norm in norms:
        assert norm.num_batches_tracked == 1, name
        assert norm.momentum == 0.01, name
        assert not torch.equal(norm.running_mean, before[f"{name}.running_mean"]), name


def test_the_blocks_are_computed_again(every_size):
    """And once only, however they are nested: the predictors of the kMaX decoders are inside of these."""
    model = checkpoint_blocks(small_model())
    calls = count_calls(model)
    training_step(model)
    assert calls == {name: 2 if name.startswith(RESNET_BLOCKS) else 1 for name in calls}
    assert len(calls) == sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in model.modules())


def test_only_axial_blocks_of_small_maps_are_computed_again():
    model = checkpoint_blocks(small_model())
    calls = count_calls(model)
    training_step(model)
    axial = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, AxialBlock))
    assert axial
    assert {name for name, count in calls.items() if count == 2} == {name for name in calls if name.startswith(axial)}


def test_less_memory_is_kept(every_size):
    plain = small_model(MODEL__KMAX__RESNET__BLOCKS=[3, 3, 3, 3])
    checkpointed = checkpoint_blocks(small_model(MODEL__KMAX__RESNET__BLOCKS=[3, 3, 3, 3]))
    kept, expected = (
        kept_bytes(lambda model=model: list(model([sample(129, 129)]).values())) for model in (checkpointed, plain)
    )
    assert kept < 0.5 * expected


def test_inference_is_unchanged(every_size):
    plain = small_model().eval()
    checkpointed = checkpoint_blocks(small_model().eval())
    ours, expected = (model.predict(picture(65, 97)[None]) for model in (checkpointed, plain))
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name
    assert ours.keys() == expected.keys()
