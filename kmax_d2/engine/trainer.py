"""Detectron2's trainer with this project's data, optimizer, checkpoints and evaluators."""

import contextlib
import inspect
import logging
import os
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, MetadataCatalog, build_detection_test_loader, get_detection_dataset_dicts
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.engine.defaults import create_ddp_model
from detectron2.engine.hooks import EvalHook
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventWriter
from detectron2.utils.logger import setup_logger
from torch import nn

from ..checkpoint import KMaXCheckpointer
from ..checkpoint.download import is_address
from ..checkpoint.origin import describe_model
from ..data import MAPPER_REGISTRY, PanopticTestMapper, WithPasteSource
from ..data.check import require_readable
from ..data.loading import SkipBroken, build_seeded_loader, skip_samples, training_records
from ..errors import UserError, hide_user_errors
from ..evaluation import build_evaluator, require_evaluation, verify
from ..options import check
from ..speed import training_model, use_precision
from ..visualization import result_page
from .best import EndedEarly, KeepBest
from .diagnosis import memory_advice
from .ema import WeightAverage, unwrapped
from .optimizer import Freeze, build_lr_scheduler, build_optimizer
from .stop import STOPPED, StopOnSignal
from .train_loop import TrainLoop
from .writers import OptionalWriter, Progress, tracker

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Trains and evaluates a model; subclasses can override what :class:`~detectron2.engine.DefaultTrainer` lets them.

    Attributes:
        average: the hook that keeps the averaged weights; None without SOLVER.EMA.ENABLED.
    """

    _draws = True

    def __init__(self, cfg: CfgNode):
        # DefaultTrainer's constructor assumes a GPU for several processes and creates Detectron2's checkpointer.
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        check(cfg)  # it may come from elsewhere than load_config
        if cfg.SOLVER.IMS_PER_BATCH % (comm.get_world_size() * cfg.SOLVER.ACCUMULATE):
            raise UserError(
                "SOLVER.IMS_PER_BATCH, the images of a step, must be a multiple of the number of processes, times "
                "SOLVER.ACCUMULATE"
            )
        cfg = cfg.clone()
        cfg.defrost()
        if cfg.SEED < 0:
            cfg.SEED = comm.shared_random_seed()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        self._freeze = Freeze(model, cfg.SOLVER.FREEZE)
        self.average = WeightAverage(model, cfg) if cfg.SOLVER.EMA.ENABLED else None
        model = training_model(model, cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        device_ids = [comm.get_local_rank()] if cfg.MODEL.DEVICE.startswith("cuda") else None
        model = create_ddp_model(model, broadcast_buffers=False, device_ids=device_ids)
        self._trainer = self.build_train_loop(cfg, model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = self.build_checkpointer(cfg, model, trainer=weakref.proxy(self))
        self.start_iter, self.max_iter, self.cfg = 0, cfg.SOLVER.MAX_ITER, cfg
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_train_loop(
        cls, cfg: CfgNode, model: nn.Module, data_loader: Iterable, optimizer: torch.optim.Optimizer
    ) -> TrainLoop:
        """Returns what runs an iteration, a TrainLoop or a subclass of it."""
        precision = cfg.SOLVER.AMP.PRECISION if cfg.SOLVER.AMP.ENABLED else "float32"
        return TrainLoop(model, data_loader, optimizer, cfg.SEED, precision, cfg.SOLVER.ACCUMULATE)

    @classmethod
    def build_checkpointer(cls, cfg: CfgNode, model: nn.Module, **checkpointables: Any) -> KMaXCheckpointer:
        """Returns the checkpointer of the training; `checkpointables` are saved with the model."""
        keep, origin = cfg.SOLVER.KEEP_CHECKPOINTS, describe_model(cfg)
        return KMaXCheckpointer(model, cfg.OUTPUT_DIR, keep=keep, origin=origin, **checkpointables)

    @property
    def final_model(self) -> nn.Module:
        """The model to use after training: the averaged one if there is one, else the one that was trained."""
        return self.model if self.average is None else self.average.model

    def build_hooks(self) -> list[HookBase | None]:
        """Returns Detectron2's hooks and this project's, most of them after the evaluation.

        Averaged weights are updated before they are saved and evaluated.
        """
        cfg, hooks = self.cfg, super().build_hooks()
        at = next(index for index, hook in enumerate(hooks) if isinstance(hook, EvalHook))
        average = self.average and EvalHook(cfg.TEST.EVAL_PERIOD, self._test_average)
        evaluates = cfg.TEST.EVAL_PERIOD > 0
        pictures = EvalHook(cfg.TEST.EVAL_PERIOD, self._draw) if evaluates and cfg.TEST.PICTURES else None
        best = KeepBest(cfg, self.final_model) if evaluates and cfg.SOLVER.BEST_METRIC else None
        own = [StopOnSignal(), hooks[at], average, pictures, best]
        return [self._freeze, self.average, *hooks[:at], *own, *hooks[at + 1 :]]

    def build_writers(self) -> list[EventWriter]:
        """Returns Detectron2's writers, with a line of our own, and trackers; one that fails does not end the run."""
        writers = [w for w in super().build_writers() if not isinstance(w, CommonMetricPrinter)]
        writers += [tracker(name, self.cfg) for name in self.cfg.SOLVER.TRACKERS]
        return [Progress(self.max_iter, self.cfg.SOLVER.IMS_PER_BATCH), *map(OptionalWriter, writers)]

    def run_step(self) -> None:
        """Runs one iteration. Raises UserError if memory runs out, or if a loss or a gradient is not finite."""
        try:
            super().run_step()
        except RuntimeError as error:
            if advice := memory_advice(error, self.cfg):
                raise UserError(advice) from error
            raise

    def save_final(self) -> None:
        """Saves a checkpoint as after the last iteration."""
        self.checkpointer.save("model_final", iteration=self.iter)
        if self.average is not None:
            self.average.save()

    def save_last_step(self) -> None:
        """Saves a checkpoint of the last iteration, if there is one, from which a run that ends too early resumes."""
        if self._trainer.last_step is not None:
            self.iter = self._trainer.iter = self._trainer.last_step  # which the checkpoint contains too
            self.checkpointer.save(f"model_{self.iter:07d}", iteration=self.iter)

    def _draw(self) -> None:
        """Draws the predictions on some test images, always the same ones, for TensorBoard, until that fails."""
        cfg, names = self.cfg, self.cfg.DATASETS.TEST
        if not names or not self._draws or not comm.is_main_process():
            return
        try:
            inputs, count = self.build_test_loader(cfg, names[0]).dataset, cfg.TEST.PICTURES  # type: ignore[attr-defined]
            with use_precision(cfg.MODEL.KMAX.TEST.PRECISION, cfg.MODEL.DEVICE):
                for index in range(0, len(inputs), max(1, len(inputs) // count))[:count]:
                    record = inputs[index]
                    page = result_page(unwrapped(self.final_model), record, MetadataCatalog.get(names[0]))
                    self.storage.put_image(f"predictions/{Path(record['file_name']).stem}", page.transpose(2, 0, 1))
        except Exception as error:  # of any part, also the user's: pictures are never worth a training
            self._draws = False
            logger.warning(f"cannot draw predictions ({type(error).__name__}: {error}): training goes on without")

    def _test_average(self) -> dict:
        """Evaluates the averaged weights after the raw ones; task "ema/sem_seg" stands beside "sem_seg"."""
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "ema")
        saved = cfg.MODEL.KMAX.TEST.SAVE_PREDICTIONS
        cfg.MODEL.KMAX.TEST.SAVE_PREDICTIONS = saved and os.path.join(saved, "ema")
        results = {f"ema/{task}": metrics for task, metrics in self.test(cfg, self.final_model).items()}
        self._last_eval_results |= results
        return results

    def train(self) -> dict:
        """Trains from start_iter to max_iter. If an error ends the run, a checkpoint of its last step is saved.

        Returns the results of the last evaluation, in the main process; none if a subclass left evaluation out.
        """
        self.require_test_data(self.cfg)
        log = logging.getLogger(TrainerBase.__module__)
        log.addFilter(hide_user_errors)
        try:
            TrainerBase.train(self, self.start_iter, self.max_iter)
        except EndedEarly:
            pass
        except Exception:
            with contextlib.suppress(Exception):  # the first error is the one to report
                self.save_last_step()
            if any(isinstance(hook, StopOnSignal) and hook.received for hook in self._hooks):
                sys.exit(STOPPED)  # the same signal ended a process that this one needs
            raise
        finally:
            log.removeFilter(hide_user_errors)
        results = getattr(self, "_last_eval_results", {})
        if comm.is_main_process():
            verify(self.cfg, results)
        return results

    def resume_or_load(self, resume: bool = True) -> None:
        """Loads weights as Detectron2 does; a resumed run goes on as if it had not been interrupted."""
        try:
            super().resume_or_load(resume)
        except UserError as error:
            resumes = resume and self.checkpointer.has_checkpoint()
            if is_address(self.cfg.MODEL.WEIGHTS) and not resumes:
                raise UserError(f'{error}; or train from scratch with MODEL.WEIGHTS ""') from error
            raise
        loop = self._trainer
        if self.start_iter and loop.seed != self.cfg.SEED:
            self.cfg.SEED = loop.seed
            loop.data_loader = self.build_train_loader(self.cfg)
        skip_samples(loop.data_loader, loop.samples)

    def state_dict(self) -> dict:
        """Returns the state of the run, with the loop's, which Detectron2's 0.6 release leaves out."""
        return TrainerBase.state_dict(self) | {"_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restores what :meth:`state_dict` returns."""
        if not isinstance(state_dict["iteration"], int):
            raise ValueError(f"the iteration {state_dict['iteration']!r}")
        TrainerBase.load_state_dict(self, state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])

    @classmethod
    def require_test_data(cls, cfg: CfgNode) -> None:
        """Raises UserError for what would end an evaluation only after its predictions. The main process looks."""
        for name in cfg.DATASETS.TEST if comm.is_main_process() else ():
            if inspect.getattr_static(cls, "build_evaluator") is Trainer.__dict__["build_evaluator"]:
                require_evaluation(cfg, name)
            with _needs_files_of([name]):
                require_readable([name], get_detection_dataset_dicts(name, filter_empty=False))

    build_optimizer = staticmethod(build_optimizer)
    build_lr_scheduler = staticmethod(build_lr_scheduler)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[list[dict]]:
        """Returns endless batches of mapped training records. Raises UserError if a dataset is not on disk."""
        if not cfg.DATASETS.TRAIN:
            raise UserError("no dataset to train on: set DATASETS.TRAIN, or name your own data with --train-data")
        mapper = MAPPER_REGISTRY.get(cfg.INPUT.DATASET_MAPPER_NAME)(cfg)
        with _needs_files_of(cfg.DATASETS.TRAIN):
            dataset: Any = training_records(cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
        if isinstance(dataset, list):
            if comm.is_main_process() and not cfg.INPUT.SKIP_BROKEN:
                require_readable(cfg.DATASETS.TRAIN, dataset)
            dataset = DatasetFromList(dataset, copy=False)  # shared by all workers
        if cfg.INPUT.COPY_PASTE:
            dataset = WithPasteSource(dataset)
        if cfg.INPUT.SKIP_BROKEN:
            mapper = SkipBroken(mapper, len(dataset))
        return build_seeded_loader(cfg, dataset, mapper)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[list[dict]]:
        """Returns the test images of a dataset. Raises UserError if it is not on disk."""
        with _needs_files_of([dataset_name]):
            return build_detection_test_loader(cfg, dataset_name, mapper=PanopticTestMapper(cfg))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluators:
        """Returns the evaluators of a dataset, which write below OUTPUT_DIR/inference."""
        return build_evaluator(cfg, dataset_name, os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name))

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Sequence[DatasetEvaluator] | None = None) -> dict:
        """Evaluates as Detectron2 does, in the precision MODEL.KMAX.TEST.PRECISION."""
        with use_precision(cfg.MODEL.KMAX.TEST.PRECISION, cfg.MODEL.DEVICE):
            return super().test(cfg, model, evaluators)


@contextlib.contextmanager
def _needs_files_of(dataset_names: Sequence[str]) -> Iterator[None]:
    """Turns the errors of Detectron2's loaders about missing files into one clear line."""
    try:
        yield
    except (FileNotFoundError, AssertionError) as error:
        root = os.environ.get("DETECTRON2_DATASETS", "datasets")
        raise UserError(
            f"the dataset {', '.join(dataset_names)} is not on disk ({error}); Detectron2's own datasets belong below "
            f"DETECTRON2_DATASETS, now {root}"
        ) from error
