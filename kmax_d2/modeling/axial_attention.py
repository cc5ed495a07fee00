"""Axial attention with learned relative positions (Axial-DeepLab, ECCV 2020, Eq. 4), and the block around it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import DropPath
from torch import nn

from .layers import ConvBN, affine_of, batch_norm, fold_norm_, truncated_normal_
from .recompute import recompute

MAX_LENGTH = 255


class AxialAttention1D(nn.Module):
    """Position-sensitive attention along one axis of a feature map.

    Args:
        in_channels: channels of the input.
        width: base width C; keys and queries have C channels over all heads, values 2C.
        axis: "height" or "width", the axis along which positions attend to each other.
        stride: every stride-th position of that axis is kept, after all have been computed.
        num_heads: number of heads.
        norm: name of the batch norm.
    """

    def __init__(self, in_channels: int, width: int, axis: str, *, norm: str, stride: int = 1, num_heads: int = 8):
        super().__init__()
        if axis not in ("height", "width"):
            raise ValueError(f"axis must be 'height' or 'width', not {axis!r}")
        self.axis = axis
        self.stride = stride
        self.num_heads = num_heads
        self.key_dim = width // num_heads
        self.value_dim = 2 * width // num_heads
        self.qkv = nn.Conv2d(in_channels, 4 * width, 1, bias=False)
        truncated_normal_(self.qkv.weight, in_channels**-0.5)
        self.norm_qkv = batch_norm(norm, 4 * width)
        # One gain and bias for each kind of logit (content, query-position, key-position) and head.
        self.norm_logits = batch_norm(norm, 3 * num_heads)
        # Kinds of retrieved value: content, position.
        self.norm_values = batch_norm(norm, 2 * 2 * width)
        self.query_positions = nn.Parameter(truncated_normal_(torch.empty(2 * MAX_LENGTH - 1, self.key_dim), 1.0))
        self.key_positions = nn.Parameter(truncated_normal_(torch.empty(2 * MAX_LENGTH - 1, self.key_dim), 1.0))
        self.value_positions = nn.Parameter(truncated_normal_(torch.empty(2 * MAX_LENGTH - 1, self.value_dim), 1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, H, W) to (B, 2 · width, H, W), the axis of length L strided to ceil(L / stride).

        Raises ValueError if the axis is longer than 255.
        """
        length = x.shape[2 if self.axis == "height" else 3]
        if length > MAX_LENGTH:
            raise ValueError(f"axial attention reaches {MAX_LENGTH} positions; the map's {self.axis} has {length}")
        # All that follows the convolution is cheap to compute, but large to keep.
        return recompute(self._attend, self.qkv(x), modules=[self])

    def _attend(self, qkv: torch.Tensor) -> torch.Tensor:
        """From (B, 4 · width, H, W), keys, queries and values before their norm."""
        batch, _, height, width = qkv.shape
        length = height if self.axis == "height" else width
        # (B, H, W, C) -> (lines, heads, L, d), a line being one row or column.
        to_lines = (0, 2, 3, 1, 4) if self.axis == "height" else (0, 1, 3, 2, 4)

        def lines(t: torch.Tensor) -> torch.Tensor:
            t = t.unflatten(3, (self.num_heads, -1)).permute(to_lines)
            return t.reshape(-1, self.num_heads, length, t.shape[-1])

        key_width = self.num_heads * self.key_dim
        # Channels last before anything else, so that the norm's gradient comes in the layout of its input.
        qkv = self.norm_qkv(qkv).permute(0, 2, 3, 1)
        q, k, v = qkv.split([key_width, key_width, self.num_heads * self.value_dim], dim=3)
        q, k, v = lines(q), lines(k), lines(v)

        # Row l of a gathered table holds the vectors of distances m - l, for all m.
        positions = torch.arange(length, device=qkv.device)
        distance = positions[None, :] - positions[:, None] + MAX_LENGTH - 1
        logits = [
            q @ k.transpose(-1, -2),
            _by_position(q, self.query_positions[distance].transpose(1, 2)),
            _by_position(k, self.key_positions[distance.T].transpose(1, 2)).transpose(-1, -2),
        ]
        # Autocast would write float32 logits and attention, which the next product rounds again.
        with torch.autocast(qkv.device.type, enabled=False):
            attention = self._norm_and_sum(self.norm_logits, logits, channel_dims=1).softmax(dim=-1)
        retrieved = [attention @ v, _by_position(attention, self.value_positions[distance])]
        out = self._norm_and_sum(self.norm_values, [t.transpose(-1, -2) for t in retrieved], channel_dims=2)
        # Dropped only here: in training the batch norms above take their statistics over every position.
        out = out[..., :: self.stride].flatten(1, 2).unflatten(0, (batch, -1))
        return out.permute(0, 2, 3, 1) if self.axis == "height" else out.transpose(1, 2)

    def _norm_and_sum(self, norm: nn.Module, kinds: Sequence[torch.Tensor], channel_dims: int) -> torch.Tensor:
        """Sums kinds (lines, channels, ...) after one batch norm over kinds × channels; these fill `channel_dims`."""
        if self.training:
            together = torch.stack(kinds, dim=1)
            normed = norm(together.flatten(1, 1 + channel_dims).flatten(2)[..., None])
            return normed.view_as(together).sum(1)
        # In inference that is an affine map, which needs no copy of them all.
        shape = kinds[0].shape[1 : 1 + channel_dims] + (1,) * (kinds[0].ndim - 1 - channel_dims)
        gain, shift = (t.view(len(kinds), *shape).to(kinds[0].dtype) for t in affine_of(norm))
        total = torch.addcmul(shift.sum(0), kinds[0], gain[0])
        for kind, own_gain in zip(kinds[1:], gain[1:], strict=True):
            total.addcmul_(kind, own_gain)
        return total

    def fold_(self) -> None:
        self.norm_qkv = fold_norm_(self.qkv, self.norm_qkv)


def _by_position(x: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Each position's vectors times its own matrix: (lines, heads, L, i) and (L, i, j) to (lines, heads, L, j)."""
    return torch.bmm(x.flatten(0, 1).transpose(0, 1), tables).transpose(0, 1).view(*x.shape[:3], -1)


class AxialBlock(nn.Module):
    """Residual block: 1×1 to 2C, attention along the height and then the width, 1×1 to 4C (MaX-DeepLab).

    Takes and gives raw sums: the input is activated here, the output is not.

    Args:
        in_channels: channels of the raw input.
        width: base width C; the output has 4C channels.
        stride: stride of both attentions and of the shortcut's projection.
        drop_path: probability of dropping the residual branch, for each sample.
        norm: name of the batch norm.
        act_layer: activation.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        norm: str,
        stride: int = 1,
        drop_path: float = 0.0,
        act_layer: type[nn.Module] = nn.GELU,
    ):
        super().__init__()
        out_channels = self.expansion * width
        self.act = act_layer()
        self.conv1 = ConvBN(in_channels, 2 * width, norm=norm, act_layer=act_layer)
        self.height_attention = AxialAttention1D(2 * width, width, "height", norm=norm, stride=stride)
        self.width_attention = AxialAttention1D(2 * width, width, "width", norm=norm, stride=stride)
        self.conv3 = ConvBN(2 * width, out_channels, norm=norm, init_gain=0.0)
        self.drop_path = DropPath(drop_path)
        needs_projection = stride != 1 or in_channels != out_channels
        self.shortcut = ConvBN(in_channels, out_channels, norm=norm, stride=stride) if needs_projection else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, H, W) to (B, 4 · width, ceil(H / stride), ceil(W / stride))."""
        x = self.act(x)
        shortcut = x if self.shortcut is None else self.shortcut(x)
        out = self.width_attention(self.height_attention(self.conv1(x)))
        out = recompute(nn.Sequential(self.act, self.conv3.conv), out, modules=[])
        return self.drop_path(self.conv3.finish(out)).add_(shortcut)
