"""A built model made ready to train or to predict as its config asks for."""

from __future__ import annotations

import functools
import logging

import torch
from detectron2.config import CfgNode
from torch import nn

from .checkpoint import checkpoint_blocks
from .compile import compile_model
from .fold import fold_batch_norms
from .precision import require_precision

logger = logging.getLogger(__name__)


def training_model(model: nn.Module, cfg: CfgNode) -> nn.Module:
    """Applies MODEL.KMAX.CHECKPOINT_BLOCKS and MODEL.KMAX.COMPILE to a model, in place, and speeds up its merging.

    Raises UserError for options that do not exist.
    """
    if cfg.MODEL.KMAX.CHECKPOINT_BLOCKS:
        checkpoint_blocks(model)
    fuse_merging(model)
    return compile_model(model, cfg.MODEL.KMAX.COMPILE)


def inference_model(model: nn.Module, cfg: CfgNode) -> nn.Module:
    """Copies a model that has its weights: batch norms folded, in MODEL.KMAX.TEST.PRECISION, compiled if wanted.

    Run it inside :func:`~kmax_d2.speed.use_precision`. Raises UserError for options that do not exist.
    """
    precision = cfg.MODEL.KMAX.TEST.PRECISION
    require_precision(precision)
    folded = fold_batch_norms(model, torch.bfloat16 if precision == "bfloat16" else torch.float32)
    fuse_merging(folded)
    return compile_model(folded, cfg.MODEL.KMAX.COMPILE)


def fuse_merging(model: nn.Module) -> None:
    """Lets a model on a GPU find the two best queries of each pixel by one Triton kernel, in place, where that runs."""
    if model.device.type == "cuda" and _kernel_runs(model.device):
        from .top_two_triton import top_two_in_one_kernel

        model.merging.top_two_queries = top_two_in_one_kernel


@functools.cache
def _kernel_runs(device: torch.device) -> bool:
    """Whether Triton is installed and can compile for this GPU, which also takes a C compiler."""
    try:
        from .top_two_triton import top_two_in_one_kernel

        top_two_in_one_kernel(torch.zeros(2, 1, 1, device=device), (1, 1), (1.0, 1.0))
    except Exception as error:  # of many kinds, from a missing compiler to an old GPU
        reason = str(error).strip().partition("\n")[0]
        logger.warning("merging runs without its Triton kernel, and slower, because it fails here: %s", reason)
        return False
    return True
