"""Depthwise convolutions with fast gradients against PyTorch's own."""

import pytest
import torch
from small import build
from torch import nn

from kmax_d2.speed import fast_depthwise_gradients


def gradients(conv, x, autocast=False):
    """The output, and the gradients of the input and the parameters for a made-up gradient of the output."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = conv(x)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y, *torch.autograd.grad(y, [x, *conv.parameters()], weight)]


@pytest.fixture
def every_size(monkeypatch):
    monkeypatch.setattr("kmax_d2.speed.depthwise.SMALLEST", 0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("side", "bias", "batch"), [(5, False, 2), (7, True, 1), (3, True, 3)])
def test_gradients_equal_the_plain_ones(every_size, side, bias, batch, layout):
    conv = nn.Conv2d(6, 6, side, padding=side // 2, groups=6, bias=bias)
    x = torch.randn(batch, 6, 9, 14).to(memory_format=layout)
    expected = gradients(conv, x)
    ours = gradients(fast_depthwise_gradients(conv), x)
    assert "Depthwise" in type(conv(x).grad_fn).__name__
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    under_autocast = gradients(conv, x, autocast=True)
    assert [g.dtype for g in under_autocast[1:]] == [g.dtype for g in expected[1:]]
    for mine, theirs in zip(under_autocast, expected, strict=True):
        assert (mine - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize(
    "options",
    [{"stride": 2}, {"dilation": 2}, {"padding": 1}, {"padding": "same"}, {"kernel_size": (5, 3)}, {"groups": 3}],
    ids=str,
)
def test_other_convolutions_stay(every_size, options):
    conv = nn.Conv2d(6, 6, **{"kernel_size": 5, "padding": 2, "groups": 6} | options)
    assert "Depthwise" not in type(fast_depthwise_gradients(conv)(torch.randn(1, 6, 9, 9)).grad_fn).__name__


def test_the_model_has_such_convolutions():
    """And they train on maps that are large enough: a small one takes PyTorch's way."""
    conv = fast_depthwise_gradients(build()).semantic_head.head.depthwise.conv
    names = [type(conv(torch.randn(1, 16, side, side)).grad_fn).__name__ for side in (128, 127)]
    assert ["Depthwise" in name for name in names] == [True, False]
