"""A built model made ready to train or to predict as its config asks for."""

import torch
from detectron2.config import CfgNode
from torch import nn

from .checkpoint import checkpoint_blocks
from .compile import compile_model
from .depthwise import fast_depthwise_gradients
from .fold import fold_batch_norms


def training_model(model: nn.Module, cfg: CfgNode) -> nn.Module:
    """Applies MODEL.KMAX.CHECKPOINT_BLOCKS and COMPILE to a model, in place; its gradients are faster on CPUs.

    Raises UserError for an unknown mode of COMPILE.
    """
    fast_depthwise_gradients(model)
    if cfg.MODEL.KMAX.CHECKPOINT_BLOCKS:
        checkpoint_blocks(model)
    return compile_model(model, cfg.MODEL.KMAX.COMPILE)


def inference_model(model: nn.Module, cfg: CfgNode) -> nn.Module:
    """Copies a model that has its weights: batch norms folded, in MODEL.KMAX.TEST.PRECISION, compiled if wanted.

    Run it inside :func:`~kmax_d2.speed.use_precision`. Raises UserError if nothing can be compiled here.
    """
    dtype = torch.bfloat16 if cfg.MODEL.KMAX.TEST.PRECISION == "bfloat16" else torch.float32
    folded = fold_batch_norms(model, dtype)
    return compile_model(folded, cfg.MODEL.KMAX.COMPILE)
