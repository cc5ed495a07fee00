"""`torch.compile` of the network, in place: names of weights, checkpoints and classes stay as they are."""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import UserError, did_you_mean

MODES = ("default", "reduce-overhead", "max-autotune")
PARTS = ("backbone", "pixel_decoder", "transformer_decoder", "semantic_head")

logger = logging.getLogger(__name__)


def compile_model(model: nn.Module, mode: str, *, backend: str = "inductor") -> nn.Module:
    """Compiles the model's PARTS; losses and merging, whose shapes the images decide, stay as they are.

    The first batch takes minutes. At test, code for sizes that vary is made where a second size comes. In training
    each size is compiled by itself, and after eight of them PyTorch goes on without. Random numbers, such as those
    of dropped paths, are not those of the plain model.
    Call it last: a copy, such as that of `fold_batch_norms`, is not compiled. Saved weights have the usual names.

    Args:
        model: a :class:`~kmax_d2.modeling.kmax_deeplab.KMaXDeepLab`, in the mode, training or not, to compile it for.
        mode: "" leaves it as it is. On a GPU, "reduce-overhead" and "max-autotune"
            replay CUDA graphs, which hold memory for each size, and the latter tries out kernels, which takes long:
            both are for sizes that do not vary. What `predict` gives the next forward pass then writes over.
        backend: what compiles; "eager" and "aot_eager" only trace, for tests, and know no mode.

    Returns:
        The model.

    Raises:
        UserError: if there is no such mode, or if nothing can be compiled here.
    """
    if not mode:
        return model
    if mode not in MODES:
        raise UserError(
            f'MODEL.KMAX.COMPILE is {mode}, but there are "", {", ".join(MODES)}{did_you_mean(mode, MODES)}'
        )
    if not hasattr(nn.Module, "compile"):
        raise UserError(f"MODEL.KMAX.COMPILE needs PyTorch 2.2 or newer, not {torch.__version__}")
    _try_out(backend, model.device)
    logger.warning("torch.compile: the first batch, and the first of another size, take minutes")
    for name in PARTS:
        part = getattr(model, name)
        if part is not None:
            # Training with symbolic sizes is beyond PyTorch 2.11's compiler (the axial attention's views), and crops
            # have one size.
            dynamic = False if model.training else None
            part.compile(backend=backend, dynamic=dynamic, mode=mode if backend == "inductor" else None)
    if mode != "default":
        model.register_forward_pre_hook(_begin_step)
    return model


def _try_out(backend: str, device: torch.device) -> None:
    """Raises UserError where torch.compile does not work, of which it tells only at the first batch, at length."""
    try:
        torch.compile(F.gelu, backend=backend)(torch.zeros(8, device=device))
    except Exception as error:  # each missing tool in its own way
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"torch.compile does not work here ({reason}): install a C++ compiler and Python's headers, or set "
            'MODEL.KMAX.COMPILE ""'
        ) from error


def _begin_step(model: nn.Module, inputs: tuple) -> None:
    """All parts of a forward pass belong to one step, whose memory CUDA graphs may take for the next."""
    torch.compiler.cudagraph_mark_step_begin()
