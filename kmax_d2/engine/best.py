"""Keeps the best weights, and ends the training when they get no better."""

import logging
import math
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.engine.hooks import BestCheckpointer
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from torch import nn

from ..checkpoint import KMaXCheckpointer
from ..checkpoint.origin import describe_model
from ..errors import did_you_mean
from .ema import final_name

logger = logging.getLogger(__name__)


class EndedEarly(BaseException):
    """The training ends as after its last iteration; not an error."""


class KeepBest(BestCheckpointer):
    """Saves the weights of the best SOLVER.BEST_METRIC as model_best.pth, and ends the training after SOLVER.PATIENCE.

    With averaged weights, these are what is saved, by their own metric; of several test sets, the metric is the first
    one's unless it names another. A resumed run reads from the file which metric is the best so far, and since when.
    Register it after the evaluations, in every process.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module):
        metric = final_name(cfg, cfg.SOLVER.BEST_METRIC)
        checkpointer = KMaXCheckpointer(model, cfg.OUTPUT_DIR, origin=describe_model(cfg))
        super().__init__(cfg.TEST.EVAL_PERIOD, checkpointer, metric)
        names = (cfg.SOLVER.BEST_METRIC, *(f"{name}/{cfg.SOLVER.BEST_METRIC}" for name in cfg.DATASETS.TEST[:1]))
        self._names = [final_name(cfg, name) for name in names]
        self._patience = cfg.SOLVER.PATIENCE * cfg.TEST.EVAL_PERIOD  # in iterations
        self._file = Path(cfg.OUTPUT_DIR, "model_best.pth")

    def before_train(self) -> None:
        """Takes over the best metric of the run that is resumed."""
        if self.trainer.start_iter and self._file.is_file():
            saved = torch.load(self._file, map_location="cpu", weights_only=True, mmap=True)
            self.best_metric, self.best_iter = saved.get(self._val_metric), saved["iteration"]
        if self._patience:
            self._end_if_impatient(self.trainer.start_iter - 1)

    def after_step(self) -> None:
        """Saves after an evaluation, and ends the training if enough of them gave nothing better."""
        super().after_step()
        following = self.trainer.iter + 1
        if self._patience and following % self._period == 0 and following != self.trainer.max_iter:
            self._end_if_impatient(self.trainer.iter, save=True)

    def _best_checking(self) -> None:
        """Compares the newest metric with the best one, where Detectron2's hook does."""
        latest = self.trainer.storage.latest()
        name = next((name for name in self._names if name in latest), None)
        if name is None:
            self._warn()
            return
        value, iteration = latest[name]
        if math.isfinite(value) and (self.best_metric is None or value > self.best_metric):
            self._update_best(value, iteration)
            self._checkpointer.save("model_best", iteration=iteration, **{self._val_metric: value})
            logger.info(f"the best so far: {self._val_metric} is {value:.2f}")

    def _warn(self) -> None:
        """Warns that no evaluation gives the metric, in the main process, which alone has results."""
        results = flatten_results_dict(getattr(self.trainer, "_last_eval_results", {}))
        names = [name.removeprefix("ema/") for name in results if "-" not in name.rpartition("/")[2]]  # not by class
        if comm.is_main_process():
            metric = self._names[0].removeprefix("ema/")
            logger.warning(
                f"no evaluation gives SOLVER.BEST_METRIC {metric}{did_you_mean(metric, names)}: neither model_best.pth "
                f"nor SOLVER.PATIENCE has an effect. The metrics are {', '.join(dict.fromkeys(names))}"
            )

    def _end_if_impatient(self, iteration: int, save: bool = False) -> None:
        waited = self.best_iter is not None and iteration - self.best_iter >= self._patience
        if any(comm.all_gather(waited)):  # only the main process knows the metric
            logger.info(f"no better {self._val_metric} for {self._patience} iterations: the training ends")
            if save:
                self.trainer.save_final()
            raise EndedEarly
