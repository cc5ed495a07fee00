"""Detectron2's trainer with this project's data, optimizer, checkpoints and evaluators."""

from __future__ import annotations

import contextlib
import logging
import os
import weakref
from collections.abc import Iterator, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer
from detectron2.engine.defaults import create_ddp_model
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from torch import nn

from ..checkpoint import KMaXCheckpointer
from ..checkpoint.download import is_address
from ..data import MAPPER_REGISTRY, PanopticTestMapper, SkipBroken, WithPasteSource, skip_samples, training_records
from ..errors import HideUserErrors, UserError
from ..evaluation import build_evaluator
from ..speed import require_precision, training_model, use_precision
from .optimizer import build_lr_scheduler, build_optimizer
from .train_loop import TrainLoop


@contextlib.contextmanager
def _needs_files_of(dataset_names: Sequence[str]) -> Iterator[None]:
    """Says in one line that a dataset is not on disk, where Detectron2's loaders meet a file that is not there."""
    try:
        yield
    except (FileNotFoundError, AssertionError) as error:
        root = os.environ.get("DETECTRON2_DATASETS", "datasets")
        raise UserError(
            f"the dataset {', '.join(dataset_names)} is not on disk ({error}); Detectron2's own datasets belong below "
            f"DETECTRON2_DATASETS, now {root}"
        ) from error


logging.getLogger(TrainerBase.__module__).addFilter(HideUserErrors())


class Trainer(DefaultTrainer):
    """Everything that :class:`~detectron2.engine.DefaultTrainer` offers can be overridden here too."""

    def __init__(self, cfg: CfgNode):
        # DefaultTrainer's own would put the model on a GPU's process group and take Detectron2's checkpointer.
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        require_precision(cfg.MODEL.KMAX.TEST.PRECISION)  # now, not at the first evaluation
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = training_model(self.build_model(cfg), cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        on_gpu = cfg.MODEL.DEVICE.startswith("cuda")
        device_ids = [comm.get_local_rank()] if on_gpu else None
        model = create_ddp_model(model, broadcast_buffers=False, device_ids=device_ids)
        precision = cfg.SOLVER.AMP.PRECISION if cfg.SOLVER.AMP.ENABLED else "float32"
        self._trainer = TrainLoop(model, data_loader, optimizer, precision)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = KMaXCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """As Detectron2's; a resumed run's data go on in their order, and its randomness is not that of its start."""
        try:
            super().resume_or_load(resume)
        except UserError as error:
            resumes = resume and self.checkpointer.has_checkpoint()
            if is_address(self.cfg.MODEL.WEIGHTS) and not resumes:
                raise UserError(f'{error}; or train from scratch with MODEL.WEIGHTS ""') from error
            raise
        if self.start_iter == 0:
            return
        images = self.cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
        skip_samples(self._trainer.data_loader, self.start_iter * images)
        if self.cfg.SEED >= 0:
            seed_all_rng(self.cfg.SEED + comm.get_rank() + self.start_iter)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer):
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        mapper = MAPPER_REGISTRY.get(cfg.INPUT.DATASET_MAPPER_NAME)(cfg)
        with _needs_files_of(cfg.DATASETS.TRAIN):
            dataset = training_records(cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
        if isinstance(dataset, list):
            dataset = DatasetFromList(dataset, copy=False)  # in memory that all workers share
        if cfg.INPUT.COPY_PASTE:
            dataset = WithPasteSource(dataset)
        if cfg.INPUT.SKIP_BROKEN:
            mapper = SkipBroken(mapper, len(dataset))
        return build_detection_train_loader(cfg, mapper=mapper, dataset=dataset)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        with _needs_files_of([dataset_name]):
            return build_detection_test_loader(cfg, dataset_name, mapper=PanopticTestMapper(cfg))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluators:
        folder = os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
        return build_evaluator(cfg, dataset_name, folder)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Sequence[DatasetEvaluator] | None = None) -> dict:
        """As Detectron2's, in the precision that MODEL.KMAX.TEST.PRECISION names."""
        with use_precision(cfg.MODEL.KMAX.TEST.PRECISION, cfg.MODEL.DEVICE):
            return super().test(cfg, model, evaluators)
