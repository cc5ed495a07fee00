"""Where a training sampler's endless stream of indices starts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from detectron2.data.common import ToIterableDataset
from torch.utils.data import Sampler


class SkippingSampler(Sampler):
    """The stream of another sampler without its first `count` indices."""

    def __init__(self, sampler: Sampler, count: int):
        self.sampler = sampler
        self.count = count

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(self.sampler, self.count, None)


def skip_samples(loader: Iterable, count: int) -> None:
    """Lets one of Detectron2's training loaders start after `count` samples of this process, without reading them.

    A loader that has no sampler is left as it is.
    """
    stage = loader
    while stage is not None and not isinstance(stage, ToIterableDataset):
        stage = getattr(stage, "dataset", None)
    if stage is not None:
        stage.sampler = SkippingSampler(stage.sampler, count)
