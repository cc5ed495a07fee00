"""Axial attention with learned relative positions (Axial-DeepLab, ECCV 2020, Eq. 4), and the block around it."""

from __future__ import annotations

import torch
from timm.layers import DropPath
from torch import nn

from .layers import ConvBN, batch_norm, truncated_normal_

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
        batch, _, height, width = x.shape
        length = height if self.axis == "height" else width
        if length > MAX_LENGTH:
            raise ValueError(f"axial attention reaches {MAX_LENGTH} positions; the map's {self.axis} has {length}")
        # (B, C, H, W) -> (lines, heads, L, d), a line being one row or column.
        to_lines = (0, 4, 1, 3, 2) if self.axis == "height" else (0, 3, 1, 4, 2)

        def lines(t: torch.Tensor) -> torch.Tensor:
            t = t.reshape(batch, self.num_heads, -1, height, width).permute(to_lines)
            return t.reshape(-1, self.num_heads, length, t.shape[-1])

        key_width = self.num_heads * self.key_dim
        q, k, v = self.norm_qkv(self.qkv(x)).split([key_width, key_width, self.num_heads * self.value_dim], dim=1)
        q, k, v = lines(q), lines(k), lines(v)

        # Row l of a gathered table holds the vectors of distances m - l, for all m.
        positions = torch.arange(length, device=x.device)
        distance = positions[None, :] - positions[:, None] + MAX_LENGTH - 1
        logits = torch.stack(
            [
                q @ k.transpose(-1, -2),
                torch.einsum("bhld,lmd->bhlm", q, self.query_positions[distance]),
                torch.einsum("bhmd,lmd->bhlm", k, self.key_positions[distance]),
            ],
            dim=1,
        )
        logits = self.norm_logits(logits.flatten(1, 2)).view_as(logits).sum(1)
        attention = logits.softmax(dim=-1)

        retrieved = torch.stack(
            [attention @ v, torch.einsum("bhlm,lmd->bhld", attention, self.value_positions[distance])], dim=1
        )
        # (lines, kind, heads, L, d) -> (lines, kind · heads · d, L, 1) for the norm, then the sum over kinds.
        channels = retrieved.transpose(-1, -2).reshape(retrieved.shape[0], -1, length, 1)
        out = self.norm_values(channels).view(retrieved.shape[0], 2, -1, length).sum(1)
        # Dropped only here: in training the batch norms above take their statistics over every position.
        out = out[..., :: self.stride].unflatten(0, (batch, -1))
        return out.permute(0, 2, 3, 1) if self.axis == "height" else out.transpose(1, 2)


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
        return self.drop_path(self.conv3(self.act(out))) + shortcut
