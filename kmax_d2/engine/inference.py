"""A trained model made ready to predict as the config asks for."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from torch import nn

from ..modeling.compile import compile_model
from ..modeling.fold import fold_batch_norms
from .precision import require_precision


def inference_model(model: nn.Module, cfg: CfgNode) -> nn.Module:
    """A copy of a model that has its weights: batch norms folded, in MODEL.KMAX.TEST.PRECISION, compiled if wanted.

    Run it inside :func:`~kmax_d2.engine.precision.use_precision`. Raises UserError for options that do not exist.
    """
    precision = cfg.MODEL.KMAX.TEST.PRECISION
    require_precision(precision)
    folded = fold_batch_norms(model, torch.bfloat16 if precision == "bfloat16" else torch.float32)
    return compile_model(folded, cfg.MODEL.KMAX.COMPILE)
