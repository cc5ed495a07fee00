"""Small layers that every part of the model shares."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from detectron2.layers import get_norm as d2_norm
from timm.layers import trunc_normal_tf_
from timm.layers.weight_init import variance_scaling_
from torch import nn

BN_EPS = 1e-3
BN_MOMENTUM = 0.01  # in PyTorch's sense: the share of the new batch


def he_normal_(weight: torch.Tensor) -> torch.Tensor:
    """Fills a kernel from a normal of variance 2 / fan-in, truncated at two standard deviations."""
    return variance_scaling_(weight, scale=2.0, mode="fan_in", distribution="truncated_normal")


def batch_norm(norm: str, channels: int, init_gain: float = 1.0) -> nn.Module:
    """A batch norm over dimension 1 of a 4-D tensor, by Detectron2's name, with the model's epsilon and momentum.

    An initial gain of 0 makes a residual branch start as nothing.
    """
    layer = d2_norm(norm, channels)
    layer.eps = BN_EPS
    if hasattr(layer, "momentum"):
        layer.momentum = BN_MOMENTUM
    nn.init.constant_(layer.weight, init_gain)
    return layer


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
        act_layer: type[nn.Module] = nn.Identity,
        init_gain: float = 1.0,
    ):
        super().__init__()
        padding = dilation * (kernel_size // 2)
        groups = in_channels if depthwise else 1
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups=groups, bias=False
        )
        if depthwise:
            # Glorot uniform, with the fans of a depthwise kernel as TensorFlow counts them.
            bound = (6.0 / (kernel_size**2 * (in_channels + 1))) ** 0.5
            nn.init.uniform_(self.conv.weight, -bound, bound)
        else:
            he_normal_(self.conv.weight)
        self.norm = batch_norm(norm, out_channels, init_gain)
        self.act = act_layer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, C', H', W')."""
        return self.act(self.norm(self.conv(x)))


class LinearBN(nn.Module):
    """Linear map without bias, batch norm over all vectors, an activation if one is given. (B, N, C) to (B, N, C')."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        norm: str,
        act_layer: type[nn.Module] = nn.Identity,
        init_gain: float = 1.0,
        init_std: float | None = None,
    ):
        super().__init__()
        self.linear = nn.Linear(in_channels, out_channels, bias=False)
        self.norm = batch_norm(norm, out_channels, init_gain)
        self.act = act_layer()
        if init_std is None:
            he_normal_(self.linear.weight)
        else:
            trunc_normal_tf_(self.linear.weight, std=init_std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, C) to (B, N, C')."""
        return self.act(norm_vectors(self.norm, self.linear(x)))


class DepthwiseSeparable(nn.Sequential):
    """5×5 depthwise and 1×1 convolution, each with batch norm and GELU. (B, C, H, W) to (B, C', H, W)."""

    def __init__(self, in_channels: int, out_channels: int, *, norm: str):
        super().__init__()
        self.depthwise = ConvBN(in_channels, in_channels, 5, norm=norm, depthwise=True, act_layer=nn.GELU)
        self.pointwise = ConvBN(in_channels, out_channels, norm=norm, act_layer=nn.GELU)


def norm_vectors(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Applies a batch norm to vectors (B, N, C): 4-D is the one layout that every synchronised batch norm takes."""
    return norm(x.flatten(0, 1)[:, :, None, None]).view_as(x)


def flatten_pixels(x: torch.Tensor) -> torch.Tensor:
    """Flattens a map (B, C, H, W) to a sequence of pixels (B, H · W, C)."""
    # For a batch of one, PyTorch's CPU batch norm misreads the gradient strides of flatten(2).transpose(1, 2).
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def resize(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Bilinear resize of (B, C, H, W) to (B, C, *size) with aligned corners, the model's only kind."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


def padded_side(side: int) -> int:
    """The next 32k + 1 at or above `side`, in pixels, and at least 33: what all strides up to 32 divide evenly."""
    return max(1, (side + 30) // 32) * 32 + 1


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode inside the block; afterwards each of its modules is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def backbone_maps(backbone: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Runs a backbone on padded images (B, 3, H, W) with sides 32k + 1; a map of stride s has sides 32k / s + 1.

    Detectron2's backbones may need sides that a number divides (FPN), or squares of one size (ViT): then the images are
    padded further and the maps cropped.
    """
    height, width = images.shape[-2:]
    divisor = max(1, getattr(backbone, "size_divisibility", 0))
    square = getattr(backbone, "padding_constraints", {}).get("square_size", 0)
    bottom, right = (max(square, -(-side // divisor) * divisor) - side for side in (height, width))
    if not bottom and not right:
        return backbone(images)
    strides = {name: shape.stride for name, shape in backbone.output_shape().items()}
    maps = backbone(F.pad(images, (0, right, 0, bottom)))
    return {
        name: x[..., : (height - 1) // strides[name] + 1, : (width - 1) // strides[name] + 1]
        for name, x in maps.items()
        if name in strides
    }
