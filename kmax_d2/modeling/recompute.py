"""Activations made anew in the backward pass instead of being kept for it (https://arxiv.org/abs/1604.06174)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

WORTHWHILE = 2**18  # elements of the inputs: what comes of fewer is kept, which costs little


@contextlib.contextmanager
def _statistics_kept(norms: Sequence[nn.Module]) -> Iterator[None]:
    """Batch norms inside still normalise by the batch, but leave their running statistics alone."""
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, momentum, batches in before:
            norm.momentum, norm.num_batches_tracked = momentum, batches


def recompute(function: Callable, *inputs: object, modules: Sequence[nn.Module], random: bool = False):
    """`function(*inputs)`, of which only the inputs are kept for the gradient.

    What the function computes after the last tensor that a gradient needs is not computed again: of a norm, an
    activation and a convolution the first two are.

    Args:
        function: what to run; once now and once in the backward pass, where there is one.
        inputs: its arguments.
        modules: those that the function runs. Their batch norms take in each batch once only.
        random: whether the function draws random numbers, which must be the same ones the second time.
    """
    # A compiler chooses by itself what to compute again.
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(*inputs)
    if sum(x.numel() for x in inputs if isinstance(x, torch.Tensor)) < WORTHWHILE:
        return function(*inputs)
    parts = (part for module in modules for part in module.modules())
    norms = [part for part in parts if getattr(part, "num_batches_tracked", None) is not None]
    return checkpoint(
        function,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=random,
        context_fn=lambda: (contextlib.nullcontext(), _statistics_kept(norms)),
    )


def recompute_blocks(model: nn.Module) -> None:
    """Lets every residual block of a model keep nothing but its input, in place: less memory for more time.

    A block is a module with a `drop_path`, as timm names it.
    """
    for module in model.modules():
        if isinstance(getattr(module, "drop_path", None), nn.Module):
            if isinstance(getattr(module, "act", None), nn.ReLU):
                module.act = nn.ReLU()  # the input is read again
            module.forward = functools.partial(recompute, module.forward, modules=[module], random=True)
