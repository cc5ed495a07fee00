"""A function over many items, in several processes, with a progress bar."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parallel_map(
    function: Callable[[Item], Result], items: Iterable[Item], description: str, workers: int = 0
) -> list[Result]:
    """The function's results in the order of the items.

    Args:
        function: can be pickled; what it raises, in any process, is raised here and ends the rest.
        description: words before the progress bar.
        workers: processes; 0 takes one a core.
    """
    items = list(items)
    workers = min(workers or num_cores(), len(items))
    bar = {"desc": description, "total": len(items), "mininterval": 0.5, "dynamic_ncols": True}
    if workers <= 1:
        return list(tqdm(map(function, items), **bar))
    # Forked processes start at once; new ones would each import PyTorch for seconds.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        chunk = max(1, min(16, len(items) // (4 * workers)))
        return list(tqdm(pool.map(function, items, chunksize=chunk), **bar))
