"""Batch norms folded into the convolutions and linear maps before them, for inference."""

from __future__ import annotations

import copy

import torch
from torch import nn

from .axial_attention import AxialBlock
from .bottleneck import Bottleneck
from .kmeans import KMeansCrossAttention
from .layers import ConvBN, LinearBN


class InPlaceGELU(nn.Module):
    """The exact GELU, written over its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.gelu_(x)


def _in_place(act: nn.Module) -> nn.Module:
    if isinstance(act, nn.ReLU):
        return nn.ReLU(inplace=True)
    return InPlaceGELU() if isinstance(act, nn.GELU) else act


def fold_batch_norms(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy for inference, equal to float32 rounding, in which batch norms cost nothing and activations no memory.

    In inference a batch norm is an affine map of each channel, which the weights of the linear map before it can
    hold. A module that has such a pair has a method `fold_()`; all other norms stay as they are.

    The copy has other parameters than the model: load checkpoints into the model and fold then, again after each
    change of its weights. It cannot be trained.

    Args:
        model: of any kind.
        dtype: of the weights of convolutions and linear maps. A type other than float32 is for running the copy under
            autocast to that type, which would otherwise convert them for each batch.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(model.modules()):
        if hasattr(module, "fold_"):
            module.fold_()
        if isinstance(module, (ConvBN, LinearBN)):
            module.act = _in_place(module.act)
        if isinstance(module, nn.Sequential):
            # Nobody else reads the raw sum between two blocks of a stage.
            for block in list(module)[1:]:
                if isinstance(block, (Bottleneck, AxialBlock)):
                    block.act = _in_place(block.act)
    if dtype != torch.float32:
        # The update of the centers is in float32, also under autocast.
        kept = {module.projection.linear for module in model.modules() if isinstance(module, KMeansCrossAttention)}
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)) and module not in kept:
                module.to(dtype)
    return model
