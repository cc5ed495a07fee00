"""Axial attention against loops over the positions, written from its definition, in double precision."""

import pytest
import torch
from small import plain_norm, randomize_norms
from torch import nn

from kmax_d2.errors import UserError
from kmax_d2.modeling.axial_attention import AxialAttention1D, AxialBlock

HEADS = 8


def plain_attention(module, x, training):
    """Attention along the height of x (B, C_in, H, W), position by position."""
    batch, _, length, width = x.shape
    weight = module.qkv.weight[:, :, 0, 0]
    base = weight.shape[0] // 4
    rows = x.permute(0, 3, 2, 1).reshape(-1, x.shape[1])  # image, column, position
    qkv = plain_norm(module.norm_qkv, rows @ weight.T, training)
    parts = qkv[:, :base], qkv[:, base : 2 * base], qkv[:, 2 * base :]
    q, k, v = (t.reshape(batch * width, length, HEADS, -1) for t in parts)
    distance = [[m - i + 254 for m in range(length)] for i in range(length)]
    logits = x.new_zeros(batch * width, length, length, 3, HEADS)
    for i in range(length):
        for m in range(length):
            d = distance[i][m]
            logits[:, i, m, 0] = (q[:, i] * k[:, m]).sum(-1)
            logits[:, i, m, 1] = (q[:, i] * module.query_positions[d]).sum(-1)
            logits[:, i, m, 2] = (k[:, m] * module.key_positions[d]).sum(-1)
    logits = plain_norm(module.norm_logits, logits.reshape(-1, 3 * HEADS), training)
    attention = logits.reshape(batch * width, length, length, 3, HEADS).sum(3).softmax(2)
    retrieved = x.new_zeros(batch * width, length, 2, HEADS, v.shape[-1])
    for i in range(length):
        for m in range(length):
            share = attention[:, i, m, :, None]
            retrieved[:, i, 0] += share * v[:, m]
            retrieved[:, i, 1] += share * module.value_positions[distance[i][m]]
    retrieved = plain_norm(module.norm_values, retrieved.reshape(batch * width * length, -1), training)
    out = retrieved.reshape(batch, width, length, 2, -1).sum(3)
    return out.permute(0, 3, 2, 1)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("axis", ["height", "width"])
@torch.no_grad()
def test_equals_loops_over_positions(axis, training):
    module = randomize_norms(AxialAttention1D(12, 16, axis, norm="BN")).double()
    x = torch.randn(2, 12, 5, 3).double()
    if axis == "height":
        expected = plain_attention(module, x, training)
    else:
        expected = plain_attention(module, x.transpose(2, 3), training).transpose(2, 3)
    out = module.train(training)(x)
    assert out.shape == (2, 32, 5, 3)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("axis", "kept"), [("height", (3, 6)), ("width", (5, 3))])
@torch.no_grad()
def test_stride_drops_positions_of_the_axis_afterwards(axis, kept, training):
    """Statistics in training are over all positions, also those that are dropped."""
    plain = randomize_norms(AxialAttention1D(12, 16, axis, norm="BN")).train(training)
    strided = AxialAttention1D(12, 16, axis, norm="BN", stride=2).train(training)
    strided.load_state_dict(plain.state_dict())
    x = torch.randn(2, 12, 5, 6)
    expected = plain(x)
    expected = expected[:, :, ::2] if axis == "height" else expected[..., ::2]
    out = strided(x)
    assert out.shape[-2:] == kept
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(strided.named_buffers()), dict(plain.named_buffers()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", ["height", "width"])
@pytest.mark.parametrize("length", [1, 2, 254, 255])
@torch.no_grad()
def test_lengths_up_to_255(axis, length):
    """The last positions that a table has are those that the two ends see of each other."""
    module = randomize_norms(AxialAttention1D(8, 8, axis, norm="BN")).eval()
    x = torch.randn(1, 8, length, 1) if axis == "height" else torch.randn(1, 8, 1, length)
    before = module(x).flatten(2)
    assert torch.isfinite(before).all()
    module.value_positions[254 + length - 1] += 1000
    changed = (module(x).flatten(2) - before).abs().amax((0, 1)) > 0.01
    assert changed.nonzero().flatten().tolist() == [0]
    before = module(x).flatten(2)
    module.value_positions[254 - (length - 1)] += 1000
    changed = (module(x).flatten(2) - before).abs().amax((0, 1)) > 0.01
    assert changed.nonzero().flatten().tolist() == [length - 1]


@pytest.mark.parametrize(("axis", "size"), [("height", (256, 1)), ("width", (1, 256))])
def test_longer_is_refused(axis, size):
    module = AxialAttention1D(8, 8, axis, norm="BN")
    with pytest.raises(UserError, match="255"):
        module(torch.randn(1, 8, *size))
    # Only the axis itself has a limit.
    assert module.eval()(torch.randn(1, 8, *size[::-1])).shape == (1, 16, *size[::-1])


@pytest.mark.parametrize(("width", "axis", "message"), [(8, "depth", "depth"), (12, "width", "8 heads, not 12")])
def test_bad_arguments_are_refused(width, axis, message):
    with pytest.raises(UserError, match=message):
        AxialAttention1D(8, width, axis, norm="BN")


@pytest.mark.parametrize(("in_channels", "stride"), [(32, 1), (20, 1), (32, 2), (20, 2)])
@torch.no_grad()
def test_block(in_channels, stride):
    """Height, then width, between two 1×1 convolutions, plus the activated input or its projection.

    With a stride, rows are dropped before the columns attend to each other.
    """
    block = randomize_norms(AxialBlock(in_channels, 8, norm="BN", stride=stride)).double().eval()
    x = torch.randn(2, in_channels, 5, 3).double()
    active = nn.functional.gelu(x)

    def conv(layer, y):
        y = nn.functional.conv2d(y, layer.conv.weight)
        return plain_norm(layer.norm, y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    y = nn.functional.gelu(conv(block.conv1, active))
    y = plain_attention(block.height_attention, y, False)[:, :, ::stride]
    y = plain_attention(block.width_attention, y.transpose(2, 3), False).transpose(2, 3)[..., ::stride]
    y = conv(block.conv3, nn.functional.gelu(y))
    shortcut = active[..., ::stride, ::stride]
    expected = y + (shortcut if in_channels == 32 and stride == 1 else conv(block.shortcut, shortcut))
    torch.testing.assert_close(block(x), expected)
