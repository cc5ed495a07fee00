"""Batch norms folded into the convolutions and linear maps before them, for inference."""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from ..modeling.axial_attention import AxialAttention1D
from ..modeling.kmeans import KMeansCrossAttention
from ..modeling.layers import ConvBN, LinearBN
from ..modeling.predictor import Predictor
from ..modeling.residual import ResidualBlock

# The names of a map and of the batch norm that follows it.
PAIRS = {
    ConvBN: ("conv", "norm"),
    LinearBN: ("linear", "norm"),
    AxialAttention1D: ("qkv", "norm_qkv"),
    Predictor: ("pixel_projection", "pixel_norm"),
}


class InPlaceGELU(nn.Module):
    """The exact GELU, written over its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(...) to the same shape."""
        return torch.ops.aten.gelu_(x)


def fold_batch_norms(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Copies a model for inference: equal to float32 rounding, without the cost of batch norms and activations.

    At inference a batch norm is an affine map of each channel, which the weights of the linear map before it can
    hold. Norms of another kind, such as group norms, stay. The copy has other parameters than the model: load
    checkpoints into the model, and fold again after each change of its weights. The copy cannot be trained.
    A `dtype` of convolutions and linear maps other than float32 is for running the copy under autocast to that type,
    which would otherwise convert their weights for each batch.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(model.modules()):
        for kind, (layer, norm) in PAIRS.items():
            if isinstance(module, kind):
                setattr(module, norm, _fold(getattr(module, layer), getattr(module, norm)))
        if isinstance(module, AxialAttention1D):
            setattr(module, "norm_and_sum", _affine_sum)  # noqa: B010 (not the method of a class)
        if isinstance(module, (ConvBN, LinearBN)):
            module.act = _in_place(module.act)
        if isinstance(module, nn.Sequential):
            # Nothing else reads the raw sum between two blocks of a stage.
            for block in [block for block in list(module)[1:] if isinstance(block, ResidualBlock)]:
                block.act = _in_place(block.act)
    # The update of the centers is in float32, also under autocast.
    kept = {module.projection.linear for module in model.modules() if isinstance(module, KMeansCrossAttention)}
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module not in kept:
            module.to(dtype)
    return model


def _fold(layer: nn.Conv2d | nn.Linear, norm: nn.Module) -> nn.Module:
    """Puts a batch norm into the weights of the layer before it; returns what remains in its place."""
    if not hasattr(norm, "running_var"):
        return norm
    fuse = fuse_conv_bn_weights if isinstance(layer, nn.Conv2d) else fuse_linear_bn_weights
    statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    layer.weight, layer.bias = fuse(layer.weight, layer.bias, *statistics)
    return nn.Identity()


def _in_place(act: nn.Module) -> nn.Module:
    if isinstance(act, nn.ReLU):
        return nn.ReLU(inplace=True)
    return InPlaceGELU() if isinstance(act, nn.GELU) else act


def _affine_sum(norm: nn.Module, kinds: Sequence[torch.Tensor], channel_dims: int) -> torch.Tensor:
    """:meth:`AxialAttention1D.norm_and_sum` at inference, without a copy of all kinds."""
    gain = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    shift = norm.bias - norm.running_mean * gain
    shape = kinds[0].shape[1 : 1 + channel_dims] + (1,) * (kinds[0].ndim - 1 - channel_dims)
    gain, shift = (t.view(len(kinds), *shape).to(kinds[0].dtype) for t in (gain, shift))
    total = torch.addcmul(shift.sum(0), kinds[0], gain[0])
    for kind, kind_gain in zip(kinds[1:], gain[1:], strict=True):
        total.addcmul_(kind, kind_gain)
    return total
