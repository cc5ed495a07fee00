"""Applies a function to many items in several processes, with a progress bar."""

import contextlib
import itertools
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
CGROUPS = Path("/sys/fs/cgroup")  # where Linux keeps the quotas of containers and jobs
Item = TypeVar("Item")
Result = TypeVar("Result")


def num_cores() -> int:
    """Returns the number of cores that this process may use, by its affinity and the quotas of its control groups."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError):
        groups = {line.split(":", 2)[2].strip("/") for line in Path("/proc/self/cgroup").read_text().splitlines()}
        leaves = [root / group for root in (CGROUPS, CGROUPS / "cpu") for group in groups]
        folders = {folder for leaf in leaves for folder in (leaf, *leaf.parents)}
        for folder, names in itertools.product(folders, (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"])):
            with contextlib.suppress(OSError, ValueError):  # there is no file, or it says "max"
                quota, period = (int(part) for name in names for part in (folder / name).read_text().split())
                if quota > 0:
                    cores = min(cores, math.ceil(quota / period))
    return cores


def process_context() -> BaseContext:
    """Returns how to start helper processes, which must not use PyTorch.

    Forked ones start at once where fresh ones import PyTorch for seconds, but on macOS, or once CUDA runs, may lock up.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context()
    torch: Any = sys.modules.get("torch")
    on_gpu = torch is not None and torch.cuda.is_initialized()
    return multiprocessing.get_context("forkserver" if on_gpu else "fork")


def serve_parent() -> None:
    """Makes this process end with its parent, or when that sends a signal, and ignore the signals of others.

    A scheduler or a terminal sends them to all processes of a run at once, and the parent decides what they mean.
    """

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    def obey_parent() -> None:
        while signal.sigwaitinfo(SIGNALS).si_pid != parent.pid:
            pass
        os._exit(0)

    parent: Any = multiprocessing.parent_process()
    threading.Thread(target=end_with_parent, daemon=True).start()
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=obey_parent, daemon=True).start()
    else:  # macOS, Windows
        signal.signal(signal.SIGINT, signal.SIG_IGN)


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
    with ProcessPoolExecutor(workers, mp_context=process_context(), initializer=serve_parent) as pool:
        return list(tqdm(pool.map(function, items), **bar))
