"""Axial attention with learned relative positions (Axial-DeepLab, ECCV 2020, Eq. 4), and the block around it."""

from collections.abc import Sequence

import torch
from timm.layers import trunc_normal_tf_
from torch import nn

from ..errors import UserError
from .layers import ConvBN, batch_norm
from .residual import EXPANSION, ResidualBlock

MAX_LENGTH = 255


class AxialAttention1D(nn.Module):
    """Position-sensitive attention along one axis of a feature map, "height" or "width".

    Keys and queries have `width` channels over all heads, values twice as many. Every stride-th position of the axis is
    kept, after all have been computed.
    """

    def __init__(self, in_channels: int, width: int, axis: str, *, norm: str, stride: int = 1, num_heads: int = 8):
        super().__init__()
        if axis not in ("height", "width"):
            raise UserError(f"axis must be 'height' or 'width', not {axis!r}")
        if width % num_heads:
            raise UserError(f"the width of axial attention must be a multiple of its {num_heads} heads, not {width}")
        self.axis, self.stride, self.num_heads = axis, stride, num_heads
        self.split = (width, width, 2 * width)
        self.qkv = nn.Conv2d(in_channels, 4 * width, 1, bias=False)
        trunc_normal_tf_(self.qkv.weight, std=in_channels**-0.5)
        self.norm_qkv = batch_norm(norm, 4 * width)
        # One gain and bias for each kind of logit (content, query-position, key-position) and head.
        self.norm_logits = batch_norm(norm, 3 * num_heads)
        # Kinds of retrieved value: content, position.
        self.norm_values = batch_norm(norm, 2 * 2 * width)
        self.query_positions, self.key_positions, self.value_positions = (
            nn.Parameter(trunc_normal_tf_(torch.empty(2 * MAX_LENGTH - 1, channels // num_heads)))
            for channels in self.split
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, H, W) to (B, 2 · width, H, W), the axis of length L strided to ceil(L / stride).

        Raises UserError if the axis is longer than 255.
        """
        batch, _, height, width = x.shape
        length = height if self.axis == "height" else width
        if length > MAX_LENGTH:
            raise UserError(
                f"axial attention covers {MAX_LENGTH} positions, but the {self.axis} of a map has {length}: "
                "use a smaller image"
            )
        # (B, H, W, C) -> (lines, heads, L, d), a line being one row or column.
        to_lines = (0, 2, 3, 1, 4) if self.axis == "height" else (0, 1, 3, 2, 4)

        def lines(t: torch.Tensor) -> torch.Tensor:
            t = t.unflatten(3, (self.num_heads, -1)).permute(to_lines)
            return t.reshape(-1, self.num_heads, length, t.shape[-1])

        qkv = self.norm_qkv(self.qkv(x)).permute(0, 2, 3, 1)
        q, k, v = (lines(t) for t in qkv.split(self.split, dim=3))

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
            attention = self.norm_and_sum(self.norm_logits, logits, channel_dims=1).softmax(dim=-1)
        retrieved = [attention @ v, _by_position(attention, self.value_positions[distance])]
        out = self.norm_and_sum(self.norm_values, [t.transpose(-1, -2) for t in retrieved], channel_dims=2)
        # Dropped only here: in training the batch norms above take their statistics over every position.
        out = out[..., :: self.stride].flatten(1, 2).unflatten(0, (batch, -1))
        return out.permute(0, 2, 3, 1) if self.axis == "height" else out.transpose(1, 2)

    @staticmethod
    def norm_and_sum(norm: nn.Module, kinds: Sequence[torch.Tensor], channel_dims: int) -> torch.Tensor:
        """Sums kinds (lines, channels, ...) of one shape after one batch norm over kinds × channels.

        The channels take `channel_dims` dimensions.
        """
        stacked = torch.stack(list(kinds), dim=1)
        normed = norm(stacked.flatten(1, 1 + channel_dims).flatten(2)[..., None])
        return normed.view_as(stacked).sum(1)


def _by_position(x: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Each position's vectors times its own matrix: (lines, heads, L, i) and (L, i, j) to (lines, heads, L, j)."""
    return torch.bmm(x.flatten(0, 1).transpose(0, 1), tables).transpose(0, 1).view(*x.shape[:3], -1)


class AxialBlock(ResidualBlock):
    """1×1 to 2C, attention along the height and then the width, which stride, 1×1 to 4C (MaX-DeepLab, Fig. 4)."""

    @staticmethod
    def layers(
        in_channels: int, width: int, norm: str, stride: int, act_layer: type[nn.Module]
    ) -> dict[str, nn.Module]:
        """Two convolutions and the attentions between them."""
        return {
            "conv1": ConvBN(in_channels, 2 * width, norm=norm, act_layer=act_layer),
            "height_attention": AxialAttention1D(2 * width, width, "height", norm=norm, stride=stride),
            "width_attention": AxialAttention1D(2 * width, width, "width", norm=norm, stride=stride),
            "conv3": ConvBN(2 * width, EXPANSION * width, norm=norm, init_gain=0.0),
        }

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        """Both attentions between the two convolutions."""
        return self.conv3(self.act(self.width_attention(self.height_attention(self.conv1(x)))))
