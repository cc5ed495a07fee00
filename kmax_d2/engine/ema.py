"""Averaged weights: an exponential moving average (EMA) of all weights and batch statistics over training."""

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from timm.utils import ModelEmaV3
from torch import nn

from ..checkpoint import KMaXCheckpointer
from ..checkpoint.origin import describe_model

NAME = "model_final_ema"


class WeightAverage(HookBase):
    """Averages the weights of the model that is being trained (SOLVER.EMA.ENABLED).

    The average starts at the weights of the first step. After step t it moves toward the current weights by 1 - d,
    where d is SOLVER.EMA.DECAY or, with SOLVER.EMA.WARMUP, the smaller of that and 1 - t^(-2/3). Parameters and the
    running statistics of batch norms are averaged; counters are copied.

    Each checkpoint contains the average, for `--resume`. The last step also writes it to `model_final_ema.pth` in
    OUTPUT_DIR, which can be given as MODEL.WEIGHTS like `model_final.pth`.

    Create it before the model is compiled, checkpointed or wrapped for several processes.

    Attributes:
        model: the averaged model, in evaluation mode.
    """

    def __init__(self, model: nn.Module, cfg: CfgNode):
        options = cfg.SOLVER.EMA
        self._ema = ModelEmaV3(model, decay=options.DECAY, use_warmup=options.WARMUP)
        self._restored = False
        self.model: nn.Module = self._ema.module.requires_grad_(False)
        self._checkpointer = KMaXCheckpointer(self.model, cfg.OUTPUT_DIR, origin=describe_model(cfg))

    def before_train(self) -> None:
        """Starts the average at the current weights, unless a checkpoint restored it."""
        if not self._restored:
            self._ema.set(unwrapped(self.trainer.model))

    def after_step(self) -> None:
        """Updates the average, and writes it after the last step."""
        step = self.trainer.iter + 1
        self._ema.update(unwrapped(self.trainer.model), step=step)
        if step == self.trainer.max_iter:
            self.save()

    def save(self) -> None:
        """Writes the average as a checkpoint, in the main process."""
        self._checkpointer.save(NAME)

    def state_dict(self) -> dict:
        """Returns the averaged weights, which Detectron2 stores in checkpoints."""
        return self.model.state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        """Restores averaged weights."""
        self.model.load_state_dict(state_dict)
        self._restored = True


def final_name(cfg: CfgNode, name: str) -> str:
    """Returns the name that a task or a metric of the final model has: with "ema/" if weights are averaged."""
    return f"ema/{name}" if cfg.SOLVER.EMA.ENABLED else name


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns a model without its wrapper for several processes."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
