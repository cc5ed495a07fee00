"""`torch.compile` of the network, in place: names of weights, checkpoints and classes stay as they are."""

import logging

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import UserError, did_you_mean

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")
PARTS = ("backbone", "pixel_decoder", "transformer_decoder", "semantic_head")

logger = logging.getLogger(__name__)


def compile_model(model: nn.Module, mode: str, *, backend: str = "inductor") -> nn.Module:
    """Compiles the model's PARTS; losses and merging, whose shapes the images decide, stay as they are.

    The first batch takes minutes. At test, a second size leads to code for all sizes. In training each size is compiled
    by itself, and after eight of them PyTorch runs the rest uncompiled. Random numbers, such as those of dropped
    paths, differ from the plain model's. Call it last, in the mode, training or not, to compile for: a copy, such as
    that of `fold_batch_norms`, is not compiled.

    The mode "" leaves the model as it is. On a GPU, "reduce-overhead" and "max-autotune" replay CUDA graphs, which hold
    memory for each size, and the latter tries out kernels, which takes long: both are for sizes that do not vary. The
    next forward pass then overwrites the output of `predict`. The backends "eager" and "aot_eager" only trace, for
    tests, and have no mode. Raises UserError if there is no such mode, or if nothing can be compiled here.
    """
    if not mode:
        return model
    if mode not in COMPILE_MODES:
        known = ", ".join(COMPILE_MODES) + did_you_mean(mode, COMPILE_MODES)
        raise UserError(f'MODEL.KMAX.COMPILE is {mode}, but there are "", {known}')
    _try_out(backend, model.device)
    logger.warning("torch.compile: the first batch, and the first of another size, take minutes")
    # Training with symbolic sizes is beyond PyTorch 2.11's compiler (the axial attention's views), and crops have one.
    dynamic = False if model.training else None
    for part in [getattr(model, name) for name in PARTS]:
        if part is not None:
            part.compile(backend=backend, dynamic=dynamic, mode=mode if backend == "inductor" else None)
    if mode != "default":  # a new step: CUDA graphs may reuse the memory of the last
        model.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
    return model


def _try_out(backend: str, device: torch.device) -> None:
    """Raises UserError where torch.compile does not work; it would say so only at the first batch, at length."""
    try:
        torch.compile(F.gelu, backend=backend)(torch.zeros(8, device=device))
    except Exception as error:  # each missing tool raises something else
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        remedy = 'install a C++ compiler and Python\'s headers, or set MODEL.KMAX.COMPILE ""'
        raise UserError(f"torch.compile does not work here ({reason}): {remedy}") from error
