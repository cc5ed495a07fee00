"""Evaluation in other processes, beside the model."""

from __future__ import annotations

import multiprocessing.util
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor

from detectron2.utils import comm

from ..data.parallel import num_cores

WAITING = 4  # images for each process, so that those not evaluated yet take little memory


class Background:
    """Calls functions on one image each in processes on all the cores that this rank may use.

    Args:
        collect: called here with each function's result, in the order of submission.
    """

    def __init__(self, collect: Callable[[object], None]):
        self.collect = collect
        self.workers = max(1, num_cores() // comm.get_local_size())
        self.pool: ProcessPoolExecutor | None = None
        self.waiting: deque[Future] = deque()

    def submit(self, function: Callable, *arguments: object) -> None:
        """Has `function(*arguments)` called, which must use no PyTorch; waits where the processes are far behind.

        Raises what an earlier call raised.
        """
        if self.pool is None:
            # Forked processes start at once; new ones would each import PyTorch for seconds.
            self.pool = ProcessPoolExecutor(self.workers, mp_context=multiprocessing.get_context("fork"))
            # A rank that fails would wait for its processes forever, and the other ranks for it. They are ended before
            # the queues to them are closed, which multiprocessing does at priority 10.
            end = {"cancel_futures": True}
            self.at_exit = multiprocessing.util.Finalize(None, self.pool.shutdown, kwargs=end, exitpriority=100)
        while self.waiting and (self.waiting[0].done() or len(self.waiting) >= WAITING * self.workers):
            self.collect(self.waiting.popleft().result())
        self.waiting.append(self.pool.submit(function, *arguments))

    def finish(self) -> None:
        """Waits for all calls and ends the processes."""
        try:
            while self.waiting:
                self.collect(self.waiting.popleft().result())
        finally:
            self.waiting.clear()
            if self.pool is not None:
                self.at_exit.cancel()
                self.pool.shutdown(cancel_futures=True)
                self.pool = None
