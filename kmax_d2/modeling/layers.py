"""Small layers that every part of the model shares."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from detectron2.layers import get_norm as d2_norm
from timm.layers import trunc_normal_tf_
from timm.layers.weight_init import variance_scaling_
from torch import nn

from .depthwise import DepthwiseConv2d
from .norm_act_conv import fits, norm_act_conv
from .recompute import recompute

BN_EPS = 1e-3
BN_MOMENTUM = 0.01  # in PyTorch's sense: the share of the new batch


def he_normal_(weight: torch.Tensor) -> torch.Tensor:
    """Fills a kernel from a normal of variance 2 / fan-in, truncated at two standard deviations."""
    return variance_scaling_(weight, scale=2.0, mode="fan_in", distribution="truncated_normal")


def truncated_normal_(weight: torch.Tensor, std: float) -> torch.Tensor:
    """Fills a tensor from a normal of the given standard deviation, truncated at two of them."""
    return trunc_normal_tf_(weight, std=std)


def batch_norm(norm: str, channels: int, init_gain: float = 1.0) -> nn.Module:
    """A batch norm over dimension 1 of a 4-D tensor, with the model's epsilon and momentum.

    Args:
        norm: a name that :func:`detectron2.layers.get_norm` knows, such as "BN", "SyncBN" or "naiveSyncBN".
        channels: the number of channels.
        init_gain: the initial gain; 0 makes a residual branch start as nothing.
    """
    layer = d2_norm(norm, channels)
    layer.eps = BN_EPS
    if hasattr(layer, "momentum"):
        layer.momentum = BN_MOMENTUM
    nn.init.constant_(layer.weight, init_gain)
    return layer


def affine_of(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """What a batch norm does in inference: the gain and the shift of each channel, two (C,) tensors."""
    gain = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return gain, norm.bias - norm.running_mean * gain


@torch.no_grad()
def fold_norm_(layer: nn.Conv2d | nn.Linear, norm: nn.Module) -> nn.Module:
    """Puts the batch norm that follows a layer into its weights, for inference; gives what is left in its place.

    A norm of another kind, such as a group norm, stays.
    """
    if not hasattr(norm, "running_var"):
        return norm
    gain, shift = affine_of(norm)
    layer.weight.mul_(gain.view(-1, *[1] * (layer.weight.ndim - 1)))
    layer.bias = nn.Parameter(shift if layer.bias is None else layer.bias * gain + shift, requires_grad=False)
    return nn.Identity()


def _activation(act_layer: type[nn.Module] | None) -> nn.Module:
    """One that follows a norm, whose output nobody else reads."""
    if act_layer is None:
        return nn.Identity()
    return nn.ReLU(inplace=True) if act_layer is nn.ReLU else act_layer()


class ConvBN(nn.Module):
    """Convolution without bias, batch norm, and an activation if one is given. (B, C, H, W) to (B, C', H', W')."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        *,
        norm: str,
        stride: int = 1,
        dilation: int = 1,
        depthwise: bool = False,
        act_layer: type[nn.Module] | None = None,
        init_gain: float = 1.0,
    ):
        super().__init__()
        if depthwise:
            self.conv = DepthwiseConv2d(in_channels, kernel_size)
            # Glorot's fans of a depthwise kernel, counted as TensorFlow counts them.
            area = kernel_size * kernel_size
            bound = (6.0 / (area * in_channels + area)) ** 0.5
            nn.init.uniform_(self.conv.weight, -bound, bound)
        else:
            padding = dilation * (kernel_size // 2)
            self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, bias=False)
            he_normal_(self.conv.weight)
        self.norm = batch_norm(norm, out_channels, init_gain)
        self.act = _activation(act_layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.finish(self.conv(x))

    def finish(self, x: torch.Tensor) -> torch.Tensor:
        """Norm and activation of the convolution's output."""
        if not self.training:
            return self._norm_and_act(x)
        if fits(x, self.norm, self.act):
            return norm_act_conv(x, self.norm, self.act, None)
        if isinstance(self.act, nn.GELU):  # others keep nothing but what they give
            return recompute(self._norm_and_act, x, modules=[self.norm])
        return self._norm_and_act(x)

    def _norm_and_act(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.norm(x))

    def then(self, following: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Norm and activation of the convolution's output and a convolution after them, which alone reads these."""
        if not self.training:
            return following(self._norm_and_act(x))
        if fits(x, self.norm, self.act):
            return norm_act_conv(x, self.norm, self.act, following)
        return recompute(lambda x: following(self._norm_and_act(x)), x, modules=[self.norm])

    def fold_(self) -> None:
        self.norm = fold_norm_(self.conv, self.norm)


class LinearBN(nn.Module):
    """Linear map without bias, batch norm over all vectors, an activation if one is given. (B, N, C) to (B, N, C')."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        norm: str,
        act_layer: type[nn.Module] | None = None,
        init_gain: float = 1.0,
        init_std: float | None = None,
    ):
        super().__init__()
        self.linear = nn.Linear(in_channels, out_channels, bias=False)
        self.norm = batch_norm(norm, out_channels, init_gain)
        self.act = act_layer() if act_layer is not None else nn.Identity()
        if init_std is None:
            he_normal_(self.linear.weight)
        else:
            truncated_normal_(self.linear.weight, init_std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(norm_vectors(self.norm, self.linear(x)))

    def fold_(self) -> None:
        self.norm = fold_norm_(self.linear, self.norm)


def chain(layers: Sequence[ConvBN], x: torch.Tensor) -> torch.Tensor:
    """The layers one after the other; of what lies between two convolutions, only the first one's output is kept."""
    x = layers[0].conv(x)
    for layer, following in pairwise(layers):
        x = layer.then(following.conv, x)
    return layers[-1].finish(x)


class DepthwiseSeparable(nn.Module):
    """5×5 depthwise and 1×1 convolution, each with batch norm and GELU. (B, C, H, W) to (B, C', H, W)."""

    def __init__(self, in_channels: int, out_channels: int, *, norm: str):
        super().__init__()
        self.depthwise = ConvBN(in_channels, in_channels, 5, norm=norm, depthwise=True, act_layer=nn.GELU)
        self.pointwise = ConvBN(in_channels, out_channels, norm=norm, act_layer=nn.GELU)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return chain([self.depthwise, self.pointwise], x)

    def then(self, following: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """These two and a convolution after them, which alone reads what they give."""
        return self.pointwise.then(following, self.depthwise.then(self.pointwise.conv, self.depthwise.conv(x)))


def norm_vectors(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Applies a batch norm to vectors (B, N, C): 4-D is the one layout that every synchronised batch norm takes."""
    return norm(x.flatten(0, 1)[:, :, None, None]).view_as(x)


def places(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) to (B, H · W, C)."""
    # Not flatten and transpose: PyTorch's batch norm misreads the gradient's strides of that, on CPUs, for one image.
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def resize(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bilinear resize of (B, C, H, W) to (B, C, *size) with aligned corners, the model's only kind."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


def l2_normalize(x: torch.Tensor, dim: int) -> torch.Tensor:
    """x / sqrt(max(Σx², 1e-12)) along `dim`."""
    return x * torch.rsqrt(x.square().sum(dim, keepdim=True).clamp_min(1e-12))
