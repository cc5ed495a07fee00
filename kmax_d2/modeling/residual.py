"""The residual blocks of encoder and pixel decoder: one frame, and the bottleneck that fills it."""

from typing import Any

import torch
from timm.layers import DropPath
from torch import nn

from .layers import ConvBN

EXPANSION = 4  # output channels over base width


class ResidualBlock(nn.Module):
    """Adds a branch to the shortcut. Input and output are raw sums: a block activates its input, not its output.

    Subclasses define the :meth:`layers` of their :meth:`branch`. With a base width C, the output has 4C channels.
    `stride` is that of the branch, and so of the shortcut's projection; `drop_path` is the probability of dropping the
    branch, for each sample; `options` are the subclass's own.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        norm: str,
        stride: int = 1,
        drop_path: float = 0.0,
        act_layer: type[nn.Module] = nn.GELU,
        **options: Any,
    ):
        super().__init__()
        self.act = act_layer()
        for name, layer in self.layers(in_channels, width, norm, stride, act_layer, **options).items():
            self.add_module(name, layer)
        self.drop_path = DropPath(drop_path)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != EXPANSION * width:
            self.shortcut = ConvBN(in_channels, EXPANSION * width, norm=norm, stride=stride)

    @staticmethod
    def layers(*args: Any, **options: Any) -> dict[str, nn.Module]:
        """The branch's layers by name, from the arguments of the constructor."""
        raise NotImplementedError

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        """The residual branch: (B, in_channels, H, W), activated, to the block's output shape."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, H, W) to (B, 4 · width, ceil(H / stride), ceil(W / stride))."""
        x = self.act(x)
        return self.shortcut(x) + self.drop_path(self.branch(x))


class Bottleneck(ResidualBlock):
    """1×1 to C, 3×3, which strides and may be dilated, 1×1 to 4C (https://arxiv.org/abs/1512.03385)."""

    @staticmethod
    def layers(
        in_channels: int, width: int, norm: str, stride: int, act_layer: type[nn.Module], dilation: int = 1
    ) -> dict[str, nn.Module]:
        """The three convolutions."""
        return {
            "conv1": ConvBN(in_channels, width, norm=norm, act_layer=act_layer),
            "conv2": ConvBN(width, width, 3, norm=norm, stride=stride, dilation=dilation, act_layer=act_layer),
            "conv3": ConvBN(width, EXPANSION * width, norm=norm, init_gain=0.0),
        }

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        """One after the other."""
        return self.conv3(self.conv2(self.conv1(x)))
