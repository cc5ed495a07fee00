"""The training loader: records, their paste sources, broken samples skipped, and random numbers by sample."""

import itertools
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader, get_detection_dataset_dicts
from detectron2.data.common import ToIterableDataset
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ..errors import UserError
from ..parallel import serve_parent
from .copy_paste import PASTE_SOURCE

logger = logging.getLogger(__name__)


def training_records(names: Sequence[str], filter_empty: bool) -> list[dict] | IterableDataset:
    """Loads the records of registered datasets.

    `filter_empty` drops those with nothing but crowds and void. Raises UserError if that drops all.
    """
    records = get_detection_dataset_dicts(names, filter_empty=filter_empty)
    if isinstance(records, IterableDataset):
        return records
    kept = [r for r in records if "segments_info" not in r or categories_in(r)] if filter_empty else records
    if not kept:
        raise UserError(f"no image of {', '.join(names)} has a segment: see DATALOADER.FILTER_EMPTY_ANNOTATIONS")
    if len(kept) < len(records):
        logger.info(f"{len(records) - len(kept)} of {len(records)} images have no segments and are left out")
    return kept


def categories_in(record: dict) -> set[int]:
    """Returns the classes of a record's segments (or instances) that are not crowds."""
    segments = record.get("segments_info", record.get("annotations", ()))
    return {segment["category_id"] for segment in segments if not segment.get("iscrowd", 0)}


class WithPasteSource(Dataset):
    """A dataset's records, each with a random record of the same dataset for the mapper to paste from.

    The source may be any record, also the record itself. It is drawn with NumPy, so it is determined by the seed of the
    sample. Records are not copied. Raises UserError if the dataset is iterable.
    """

    def __init__(self, dataset: Sequence[dict] | Dataset):
        if isinstance(dataset, IterableDataset):
            raise UserError("copy-paste cannot draw from an iterable dataset: set INPUT.COPY_PASTE False")
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict:
        return self.dataset[index] | {PASTE_SOURCE: self.dataset[np.random.randint(len(self))]}


class SkipBroken:
    """Wraps a mapper to return None, for which another sample is drawn, instead of raising UserError.

    If the paste source is broken, the record is used without it. Each error is logged once, with a running count.

    UserError is raised once as many samples are broken as the dataset has records, its `size`.
    """

    def __init__(self, mapper: Callable[[dict], dict], size: int):
        self.mapper, self.size = mapper, size
        self.errors: set[str] = set()

    def __call__(self, record: dict) -> dict | None:
        """Maps a record; returns None if it is broken."""
        try:
            return self.mapper(record)
        except UserError as error:
            self._log(error)
        if PASTE_SOURCE in record:
            return self({key: value for key, value in record.items() if key != PASTE_SOURCE})
        return None

    def _log(self, error: UserError) -> None:
        message = str(error)
        if message in self.errors:
            return
        self.errors.add(message)
        logger.warning("skipped a broken sample, number %d in this process: %s", len(self.errors), message)
        if len(self.errors) >= self.size:
            raise UserError(f"all {self.size} training samples are broken, the last: {message}") from error


class SeededSamples(Dataset):
    """Training samples by (number in the run, index of the record).

    All random numbers of a sample are determined by the seed and its number, so that neither the number of workers nor
    a resumed run changes it. Where the mapper returns None, another record is drawn.
    """

    def __init__(self, dataset: Any, mapper: Callable[[dict], dict | None], seed: int):
        self.dataset, self.mapper, self.seed = dataset, mapper, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, sample: tuple[int, int]) -> dict:
        number, index = sample
        seed_by(self.seed, number)
        while (mapped := self.mapper(self.dataset[index])) is None:
            index = np.random.randint(len(self))
        return mapped


class NumberedSampler(Sampler):
    """Pairs the indices of a Detectron2 sampler with their number in the run, over all processes.

    Attributes:
        first: the number of the run's first sample; those before it are left out.
    """

    def __init__(self, sampler: Sampler):
        self.sampler, self.first = sampler, 0
        self.rank, self.world_size = comm.get_rank(), comm.get_world_size()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        pairs = ((local * self.world_size + self.rank, index) for local, index in enumerate(self.sampler))
        return itertools.islice(pairs, self.first // self.world_size, None)


def seed_by(*numbers: int) -> None:
    """Seeds Python, NumPy, and PyTorch by several numbers of which each matters."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed notes a traceback for each device that is not used
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def build_seeded_loader(cfg: CfgNode, dataset: Any, mapper: Callable[[dict], dict | None]) -> Iterable[list[dict]]:
    """Builds Detectron2's training loader of records whose samples are determined by cfg.SEED and their number.

    The samples of an iterable dataset are not.
    """
    if isinstance(dataset, IterableDataset):
        return build_detection_train_loader(cfg, mapper=mapper, dataset=dataset)
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    seed_by(seed)  # from which Detectron2 draws the seed of its sampler
    records: Any = dataset  # of which Detectron2's samplers read the number, and this one the classes
    if cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler":
        source: Any = dataset.dataset if isinstance(dataset, WithPasteSource) else dataset
        records = [{"annotations": [{"category_id": c} for c in categories_in(record)]} for record in source]
    try:
        parts = build_detection_train_loader.from_config(cfg, mapper=mapper, dataset=records)
    except AssertionError as error:
        ratio = cfg.DATALOADER.RANDOM_SUBSET_RATIO
        raise UserError(f"DATALOADER.RANDOM_SUBSET_RATIO {ratio} of {len(dataset)} images is no image") from error
    parts |= {"dataset": SeededSamples(dataset, mapper, seed), "mapper": None}
    loader = build_detection_train_loader(**parts | {"sampler": NumberedSampler(parts["sampler"])})
    _protect_workers(loader)
    return loader


def _protect_workers(loader: Any) -> None:
    """Lets signals to all processes of a run leave the loader's workers alone, while the run finishes its step."""
    while not isinstance(loader, DataLoader):
        loader = loader.dataset
    loader.worker_init_fn = partial(_start_worker, loader.worker_init_fn)


def _start_worker(start: Callable[[int], None] | None, worker: int) -> None:
    serve_parent()
    if start is not None:
        start(worker)


def skip_samples(loader: Iterable, count: int) -> None:
    """Makes a loader of :func:`build_seeded_loader` start after `count` samples of all processes, without reading them.

    Any other loader is left unchanged.
    """
    stage: Any = loader
    while stage is not None and not isinstance(stage, ToIterableDataset):
        stage = getattr(stage, "dataset", None)
    if stage is not None and isinstance(stage.sampler, NumberedSampler):
        stage.sampler.first = count
