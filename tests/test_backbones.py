"""The pixel encoders: sizes, drop path, initial values and names. Their values are compared in test_forward.py."""

import functools

import pytest
import reference
import timm
import torch
import torch.nn.functional as F
from detectron2.modeling import build_backbone
from torch import nn

from kmax_d2.engine import load_config
from kmax_d2.errors import UserError
from kmax_d2.modeling.axial_attention import AxialBlock
from kmax_d2.modeling.backbones import KMaXConvNeXt, KMaXMaXS, KMaXResNet
from kmax_d2.modeling.residual import Bottleneck


def small_max_s(**options):
    return KMaXMaXS(
        **{"blocks": (2, 1, 2, 2), "widths": (8, 8, 16, 16), "stem_widths": (8, 8, 16), "norm": "BN"} | options
    )


def small_convnext(**options):
    return KMaXConvNeXt(**{"depths": (1, 2, 1, 1), "widths": (8, 16, 24, 32)} | options)


def small_resnet(**options):
    return KMaXResNet(**{"blocks": (1, 1, 1, 1), "widths": (4, 4, 8, 8), "stem_width": 4, "norm": "BN"} | options)


standard_resnet = functools.partial(small_resnet, standard=True)


def all_gains_matter(model):
    """Replaces gains of 0 and tiny layer scales, which would hide the layers before them."""
    for name, value in model.named_parameters():
        if value.ndim == 1 and name.endswith(("weight", "gamma")):
            nn.init.uniform_(value, 0.5, 1.5)
    return model


@pytest.mark.parametrize("size", [(33, 33), (65, 65), (97, 129), (161, 65)])
@pytest.mark.parametrize(
    ("build", "finest"), [(small_max_s, 2), (small_convnext, 4), (small_resnet, 2), (standard_resnet, 4)]
)
@torch.no_grad()
def test_sides_of_32k_plus_1(build, finest, size):
    """Every map has a position at the first pixel, at the last, and every stride between."""
    model = build().eval()
    maps = model(torch.randn(1, 3, *size))
    assert list(maps) == ["stage1", "stage2", "stage3", "stage4", "stage5"]
    assert list(model.output_shape()) == list(maps)
    for name, shape in model.output_shape().items():
        assert maps[name].shape == (1, shape.channels, *((side - 1) // shape.stride + 1 for side in size))
    strides = [shape.stride for shape in model.output_shape().values()]
    assert strides == [finest, 4, 8, 16, 32]
    # Only the standard form activates its maps.
    assert all((x.min() < 0) is not (build is standard_resnet) for x in maps.values())


@pytest.mark.parametrize("build", [small_max_s, small_convnext])
def test_gradients_reach_every_parameter(build):
    model = all_gains_matter(build())
    maps = model(torch.randn(2, 3, 65, 97))
    (maps["stage5"] * torch.randn_like(maps["stage5"])).sum().backward()
    assert [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()] == []


def drop_rates(model):
    """The drop path rate of each block of stages 2 to 5."""
    stages = [stage.blocks for stage in model.stages] if hasattr(model, "stages") else list(model.children())[1:]
    return [[getattr(block.drop_path, "drop_prob", 0.0) for block in stage] for stage in stages]


def test_max_s_blocks():
    with torch.device("meta"):
        model = KMaXMaXS(norm="BN")
    kinds = [[type(block) for block in stage] for stage in list(model.children())[1:]]
    assert kinds == [[Bottleneck] * 3, [Bottleneck] * 4, [Bottleneck] + [AxialBlock] * 5, [AxialBlock] * 3]
    assert drop_rates(model) == [[0] * 3, [0] * 4, [0] + [0.15] * 5, [0.15, 0.2, 0.2]]


@pytest.mark.parametrize(
    ("config", "last"),
    [
        ("coco/convnext_t", 0.3),
        ("coco/convnext_s", 0.4),
        ("coco/convnext_b", 0.5),
        ("coco/convnext_l", 0.6),
        ("cityscapes/convnext_t", 0.2),
        ("cityscapes/convnext_s", 0.3),
        ("cityscapes/convnext_b", 0.4),
        ("cityscapes/convnext_l", 0.6),
        ("ade20k/convnext_l_641", 0.7),
        ("ade20k/convnext_l_1281", 0.7),
    ],
)
def test_convnext_drop_path_is_linear_over_the_blocks(config, last):
    with torch.device("meta"):
        rates = [rate for stage in drop_rates(build_backbone(load_config(config))) for rate in stage]
    assert len(rates) == (18 if config.endswith("_t") else 36)
    assert rates == pytest.approx([last * index / (len(rates) - 1) for index in range(len(rates))])


@pytest.mark.parametrize("block_type", [Bottleneck, AxialBlock])
@torch.no_grad()
def test_drop_path_of_a_block(block_type):
    """The residual branch of each sample is either dropped or divided by its probability of being kept."""
    block = all_gains_matter(block_type(32, 8, norm="BN", drop_path=0.25))
    x = torch.randn(64, 32, 3, 3)
    shortcut = F.gelu(x)
    block.drop_path.drop_prob = 0.0
    branch = block(x) - shortcut  # in training, as the batch norms' statistics are the batch's
    block.drop_path.drop_prob = 0.25
    out = block(x) - shortcut
    kept = out.abs().amax((1, 2, 3)) > 1e-3
    assert 36 <= kept.sum() <= 60
    torch.testing.assert_close(out[kept], branch[kept] / 0.75, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out[~kept], torch.zeros_like(out[~kept]), rtol=0, atol=1e-5)


def test_max_s_starts_as_its_shortcuts():
    """The last gain of every block is 0."""
    model = small_max_s()
    blocks = [module for module in model.modules() if isinstance(module, (Bottleneck, AxialBlock))]
    assert len(blocks) == 7
    assert all((block.conv3.norm.weight == 0).all() for block in blocks)
    assert all((layer.norm.weight == 1).all() for layer in model.stem)


def test_convnext_initial_values():
    model = small_convnext(widths=(32, 64, 64, 128))
    for name, value in model.named_parameters():
        if name.endswith("gamma"):
            assert (value == 1e-6).all()
        elif value.ndim > 1:
            assert value.abs().max() <= 0.04  # truncated at two standard deviations, 0.88 of 0.02 remain
            assert value.std().item() == pytest.approx(0.0176, rel=0.1)
        else:  # biases, and the norms' gains
            assert (value == (1 if value.sum() else 0)).all()


@pytest.mark.parametrize("size", ["tiny", "base"])
def test_convnext_has_timms_names(size):
    """Thus timm's weights fit, except for its head."""
    with torch.device("meta"):
        theirs = timm.create_model(f"convnext_{size}").state_dict()
    ours = reference.outline(f"coco/convnext_{size[0]}").backbone.state_dict()
    theirs = {name: value.shape for name, value in theirs.items() if not name.startswith("head.")}
    assert theirs == {name: value.shape for name, value in ours.items()}


def test_wrong_number_of_stages():
    with pytest.raises(UserError, match="four stages"):
        small_convnext(widths=(8, 16, 24))
    with pytest.raises(UserError, match="STEM_WIDTHS needs three values"):
        small_max_s(stem_widths=(8, 8))
