"""What a run writes while it trains: a line of its progress, and metrics for trackers, which may fail."""

import importlib
import logging
import sys
from collections.abc import Callable
from datetime import timedelta

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, get_event_storage

from ..errors import UserError

logger = logging.getLogger(__name__)


class Progress(EventWriter):
    """Logs a line with the losses of the final prediction, the throughput, the time left, and the memory.

    The run has `max_iter` steps of `batch` images each.
    """

    def __init__(self, max_iter: int, batch: int):
        self.max_iter, self.batch = max_iter, batch

    def write(self) -> None:
        """Logs the line, and adds what it computes to the metrics."""
        storage = get_event_storage()
        histories = storage.histories()
        if storage.iter >= self.max_iter or "time" not in histories:  # after the last iteration, or in the first ones
            return
        seconds = histories["time"].median(1000)
        left = seconds * (self.max_iter - storage.iter - 1)
        storage.put_scalars(images_per_second=self.batch / seconds, memory_gb=peak_memory(), smoothing_hint=False)
        losses = {name: log.median(20) for name, log in histories.items() if "loss" in name and name[-1].isalpha()}
        logger.info(
            f"iteration {storage.iter + 1} of {self.max_iter}: "
            + ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
            + f"; lr {histories['lr'].latest():.3g}; {self.batch / seconds:.3g} images/s, "
            f"{timedelta(seconds=int(left))} left, {peak_memory():.1f} GB"
        )


def peak_memory() -> float:
    """Returns the most memory that this process has used, in GB: of the GPU if it uses one. On Windows, it is 0."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / (2**30 if sys.platform == "darwin" else 2**20)  # macOS counts bytes, Linux kB


class Tracker(EventWriter):
    """Passes new metrics on to `log`, which takes metrics by name and their iteration, until `close` ends that."""

    def __init__(self, log: Callable[[dict[str, float], int], object], close: Callable[[], object]):
        self.log, self.close = log, close  # type: ignore[method-assign]
        self._last = -1

    def write(self) -> None:
        """Passes on what was not yet."""
        steps: dict[int, dict[str, float]] = {}
        for name, (value, iteration) in get_event_storage().latest().items():
            if iteration > self._last:
                steps.setdefault(iteration, {})[name] = float(value)
        for iteration in sorted(steps):
            self.log(steps[iteration], iteration)
            self._last = iteration


def tracker(name: str, cfg: CfgNode) -> Tracker:
    """Starts a run of Weights & Biases ("wandb") or MLflow ("mlflow"), which their own variables configure.

    Raises UserError if the package is missing or does not start.
    """
    options = yaml.safe_load(cfg.dump())
    try:
        package = importlib.import_module(name)
        if name == "wandb":
            folder = cfg.OUTPUT_DIR
            run = package.init(project="kmax_d2", name=folder, dir=folder, config=options, resume="allow")
            return Tracker(lambda metrics, step: run.log(metrics, step=step), run.finish)
        package.set_experiment("kmax_d2")
        package.start_run(run_name=cfg.OUTPUT_DIR)
        package.log_dict(options, "config.yaml")
    except ImportError as error:
        raise UserError(f"SOLVER.TRACKERS has {name}, which is not installed: pip install {name}") from error
    except Exception as error:  # each has errors of its own
        raise UserError(f"SOLVER.TRACKERS has {name}, which does not start: {error}") from error
    return Tracker(lambda metrics, step: package.log_metrics(metrics, step=step), package.end_run)


class OptionalWriter(EventWriter):
    """Writes with another writer until that fails, on a full disk for example, which is said once."""

    def __init__(self, writer: EventWriter):
        self.writer: EventWriter | None = writer

    def write(self) -> None:
        """Writes the newest metrics."""
        self._try("write")

    def close(self) -> None:
        """Closes the other writer."""
        self._try("close")

    def _try(self, method: str) -> None:
        if self.writer is None:
            return
        try:
            getattr(self.writer, method)()
        except Exception as error:  # trackers have errors of their own
            logger.warning(f"{type(self.writer).__name__} failed ({error}): training goes on without it")
            self.writer = None
