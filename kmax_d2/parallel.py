"""Applies a function to many items in several processes, with a progress bar."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")


def num_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def serve_parent() -> None:
    """Makes this process end with its parent, however that ends, and leave Ctrl-C to it."""

    def end() -> None:
        parent.join()
        os._exit(1)

    parent: Any = multiprocessing.parent_process()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end, daemon=True).start()


def parallel_map(
    function: Callable[[Item], Result], items: Iterable[Item], description: str, workers: int = 0
) -> list[Result]:
    """Returns the function's results in the order of the items.

    Args:
        function: must be picklable. An exception that it raises in any process is raised here and stops the rest.
        items: its arguments, also picklable.
        description: label of the progress bar.
        workers: number of processes; 0 uses one per core, and 1 runs in this process.
    """
    items = list(items)
    workers = min(workers or num_cores(), len(items))
    bar: dict[str, Any] = {"desc": description, "total": len(items), "mininterval": 0.5, "dynamic_ncols": True}
    if workers <= 1:
        return list(tqdm(map(function, items), **bar))
    with ProcessPoolExecutor(workers, initializer=serve_parent) as pool:
        return list(tqdm(pool.map(function, items), **bar))
