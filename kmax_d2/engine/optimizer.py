"""AdamW with weight decay on kernels only, and a polynomial learning rate schedule with linear warmup."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier, get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from fvcore.common.param_scheduler import CompositeParamScheduler, LinearParamScheduler, PolynomialDecayParamScheduler
from torch import nn

# Last part of the names of parameters that are not kernels; biases and norms are known to Detectron2.
_NO_DECAY = ("centers", "query_positions", "key_positions", "value_positions", "gamma")


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Builds AdamW with the options of SOLVER.

    The backbone's learning rate, and with it its effective decay, is multiplied by SOLVER.BACKBONE_MULTIPLIER.
    """
    solver = cfg.SOLVER

    def factor(name: str) -> float:
        return solver.BACKBONE_MULTIPLIER if "backbone." in name else 1.0

    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=0.0,
        weight_decay_bias=0.0,
        lr_factor_func=factor,
        overrides={name: {"weight_decay": 0.0} for name in _NO_DECAY},
    )
    optimizer = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
    return optimizer(groups, solver.BASE_LR, betas=(0.9, 0.999), eps=solver.ADAM_EPS, fused=True)


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRMultiplier:
    """Builds a linear warmup from 0 over SOLVER.WARMUP_ITERS, then base · (1 - step / MAX_ITER)^POLY_POWER."""
    solver = cfg.SOLVER
    poly = PolynomialDecayParamScheduler(1.0, solver.POLY_POWER)
    warmup = min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0)
    if warmup > 0:
        poly = CompositeParamScheduler(
            [LinearParamScheduler(0.0, 1.0), poly], lengths=[warmup, 1 - warmup], interval_scaling=["rescaled", "fixed"]
        )
    return LRMultiplier(optimizer, poly, max_iter=solver.MAX_ITER)
