"""What the training loader reads: records, their paste sources, broken samples skipped, and where a run resumes."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.common import ToIterableDataset
from torch.utils.data import Dataset, IterableDataset, Sampler

from ..errors import UserError
from .copy_paste import PASTE_SOURCE

logger = logging.getLogger(__name__)


def training_records(names: Sequence[str], filter_empty: bool = True) -> list[dict] | IterableDataset:
    """Loads the records of registered datasets and adds "isthing" to segments without it, as in Cityscapes.

    Args:
        names: the datasets.
        filter_empty: drop records without annotations.
    """
    records = get_detection_dataset_dicts(names, filter_empty=filter_empty)
    if isinstance(records, IterableDataset):
        return records
    things = set(MetadataCatalog.get(names[0]).get("thing_dataset_id_to_contiguous_id", {}).values())
    for record in records:
        for segment in record.get("segments_info", ()):
            segment.setdefault("isthing", segment["category_id"] in things)
    return records


class WithPasteSource(Dataset):
    """A dataset's records, each with a random record of the same dataset for the mapper to paste from.

    The source may be any record, also the record itself. It is drawn with NumPy in the loader's worker, so it is
    determined by the worker's seed. Records are not copied.

    Args:
        dataset: a list or map-style dataset of records.

    Raises:
        UserError: the dataset is iterable.
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
    """Wraps a mapper to return None, for which Detectron2 draws another sample, instead of raising UserError.

    If the paste source is broken, the record is used without it. Each error is logged once, with a running count.

    Args:
        mapper: maps a record to a training sample.
        size: number of records in the dataset. UserError is raised once as many are broken.
    """

    def __init__(self, mapper: Callable[[dict], dict], size: int):
        self.mapper = mapper
        self.size = size
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


class SkippingSampler(Sampler):
    """The indices of another sampler without the first `count`."""

    def __init__(self, sampler: Sampler, count: int):
        self.sampler = sampler
        self.count = count

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(self.sampler, self.count, None)


def skip_samples(loader: Iterable, count: int) -> None:
    """Makes a Detectron2 training loader start after `count` samples of this process, without reading them.

    A loader without a sampler is left unchanged.
    """
    stage: Any = loader
    while stage is not None and not isinstance(stage, ToIterableDataset):
        stage = getattr(stage, "dataset", None)
    if stage is not None:
        stage.sampler = SkippingSampler(stage.sampler, count)
