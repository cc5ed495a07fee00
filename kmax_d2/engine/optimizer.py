"""What learns and how fast: AdamW with weight decay on kernels only, linear warmup, and polynomial decay."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.solver import LRMultiplier
from detectron2.solver.build import maybe_add_gradient_clipping
from fvcore.common.param_scheduler import CompositeParamScheduler, LinearParamScheduler, PolynomialDecayParamScheduler
from torch import nn

from ..errors import UserError

# Last part of the names of parameters with several axes that are not kernels.
_NO_DECAY = ("centers", "query_positions", "key_positions", "value_positions", "pos_embed", "cls_token", "reg_token")


class Freeze(HookBase):
    """Keeps parts of a model as they are (SOLVER.FREEZE): no gradients, and batch norms in evaluation mode.

    Create it before the model is compiled or wrapped for several processes. Raises UserError if nothing is left to
    learn.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]):
        self.parts = [part for name in names if (part := getattr(model, name, None)) is not None]
        for part in self.parts:
            part.requires_grad_(False)
        if not any(weight.requires_grad for weight in model.parameters()):
            raise UserError(f"SOLVER.FREEZE {', '.join(names)} leaves nothing to learn")

    def before_step(self) -> None:
        """An evaluation puts the whole model back into training mode."""
        for part in self.parts:
            part.eval()


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Builds AdamW with the options of SOLVER.

    The backbone's learning rate, and with it its effective decay, is multiplied by SOLVER.BACKBONE_MULTIPLIER, and in a
    vision transformer by SOLVER.LAYER_DECAY for each layer above. The pyramid of that learns as the decoders do.
    """
    solver = cfg.SOLVER
    layers_above = getattr(getattr(model, "backbone", None), "layers_above", None)
    if solver.LAYER_DECAY < 1 and layers_above is None:
        raise UserError("SOLVER.LAYER_DECAY is for a vision transformer in KMaXTimm: leave it out for other backbones")

    def factor(name: str) -> float:
        if "backbone." not in name:
            return 1.0
        if layers_above is None:
            return solver.BACKBONE_MULTIPLIER
        above = layers_above.get(name.partition("backbone.")[2])
        return 1.0 if above is None else solver.BACKBONE_MULTIPLIER * solver.LAYER_DECAY**above

    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            decays = weight.ndim > 1 and name.rpartition(".")[2] not in _NO_DECAY  # not biases and norms
            groups[factor(name) * solver.BASE_LR, decays * solver.WEIGHT_DECAY].append(weight)
    groups_of_adam = [{"params": weights, "lr": lr, "weight_decay": decay} for (lr, decay), weights in groups.items()]
    optimizer = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
    return optimizer(groups_of_adam, solver.BASE_LR, betas=(0.9, 0.999), eps=solver.ADAM_EPS, fused=True)


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
