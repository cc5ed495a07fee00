"""Activation checkpointing: activations are computed again in the backward pass (https://arxiv.org/abs/1604.06174)."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ..modeling.axial_attention import AxialBlock
from ..modeling.predictor import Predictor

# Pixels of a map. On smaller ones, blocks cost much to compute again and little to keep, but for axial attention.
SMALLEST = 2**12


def checkpoint_blocks(model: nn.Module) -> nn.Module:
    """Makes every block of a model on a large map keep nothing but its input for the backward pass, in place.

    These are the residual blocks of encoder and pixel decoder, the kMaX decoders, the final predictor and the semantic
    head. Gradients, running statistics and dropped paths stay what they are without checkpointing. Parts that
    `torch.compile` runs are left to the compiler.
    """
    for module in _blocks(model):
        module.forward = functools.partial(_forward, module, module.forward)
    return model


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost blocks: as timm names it, a residual block is a module with a `drop_path`."""
    for name, child in module.named_children():
        is_residual = isinstance(getattr(child, "drop_path", getattr(child, "drop_path1", None)), nn.Module)
        if is_residual or isinstance(child, Predictor) or name == "semantic_head":
            yield child
        else:
            yield from _blocks(child)


def _forward(module: nn.Module, forward: Callable, *inputs: object, **options: Any) -> object:
    trains = module.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    maps = [x for x in tree_leaves(inputs) if isinstance(x, torch.Tensor) and x.dim() == 4]
    pixels = max((x.shape[2] * x.shape[3] for x in maps), default=SMALLEST)
    if not trains or (pixels < SMALLEST and not isinstance(module, AxialBlock)):
        return forward(*inputs, **options)
    contexts = contextlib.nullcontext(), _statistics_frozen(module)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=lambda: contexts, **options)


@contextlib.contextmanager
def _statistics_frozen(module: nn.Module) -> Iterator[None]:
    """Batch norms inside normalize by the batch as before, but leave their running statistics alone."""
    norms = [part for part in module.modules() if getattr(part, "num_batches_tracked", None) is not None]
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, momentum, batches in before:
            norm.momentum, norm.num_batches_tracked = momentum, batches
