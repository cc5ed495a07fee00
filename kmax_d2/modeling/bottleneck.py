"""The residual bottleneck block, in the form that keeps its sums raw."""

from __future__ import annotations

import torch
from timm.layers import DropPath
from torch import nn

from .layers import ConvBN, chain


class Bottleneck(nn.Module):
    """Residual block: 1×1 to C, 3×3, 1×1 to 4C. Takes and gives raw sums: the input is activated here.

    Args:
        in_channels: channels of the raw input.
        width: base width C; the output has 4C channels.
        stride: stride of the 3×3 convolution and of the shortcut's projection.
        dilation: dilation of the 3×3 convolution.
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
        dilation: int = 1,
        drop_path: float = 0.0,
        act_layer: type[nn.Module] = nn.GELU,
    ):
        super().__init__()
        out_channels = self.expansion * width
        self.act = act_layer()
        self.conv1 = ConvBN(in_channels, width, norm=norm, act_layer=act_layer)
        self.conv2 = ConvBN(width, width, 3, norm=norm, stride=stride, dilation=dilation, act_layer=act_layer)
        self.conv3 = ConvBN(width, out_channels, norm=norm, init_gain=0.0)
        self.drop_path = DropPath(drop_path)
        needs_projection = stride != 1 or in_channels != out_channels
        self.shortcut = ConvBN(in_channels, out_channels, norm=norm, stride=stride) if needs_projection else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, H, W) to (B, 4 · width, ceil(H / stride), ceil(W / stride))."""
        x = self.act(x)
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return self.drop_path(chain([self.conv1, self.conv2, self.conv3], x)).add_(shortcut)
