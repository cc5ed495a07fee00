"""Evaluation in other processes, while the model goes on."""

import multiprocessing.util
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

from detectron2.utils import comm

from ..parallel import num_cores, process_context, serve_parent

PENDING = 4  # images per process, so that those not yet evaluated take little memory


class EvaluationPool:
    """Calls functions on one image each, in processes on all the cores that this rank may use.

    `collect` is called in this process with each function's result, in the order of submission.
    """

    def __init__(self, collect: Callable[[Any], None]):
        self.collect = collect
        self.workers = max(1, num_cores() // comm.get_local_size())
        self.pool: ProcessPoolExecutor | None = None
        self.pending: deque[Future] = deque()

    def submit(self, function: Callable, *arguments: object) -> None:
        """Schedules `function(*arguments)`, which must not use PyTorch; blocks while the processes are far behind.

        Raises what an earlier call raised.
        """
        if self.pool is None:
            self.pool = ProcessPoolExecutor(self.workers, mp_context=process_context(), initializer=serve_parent)
            # A rank that fails would wait for its processes forever, and the other ranks for it. End the processes with
            # this object, or before their queues are closed, which multiprocessing does at priority 10.
            end = {"cancel_futures": True}
            self.at_exit = multiprocessing.util.Finalize(self, self.pool.shutdown, kwargs=end, exitpriority=100)
        while self.pending and (self.pending[0].done() or len(self.pending) >= PENDING * self.workers):
            self.collect(self.pending.popleft().result())
        self.pending.append(self.pool.submit(function, *arguments))

    def finish(self) -> None:
        """Waits for all calls and ends the processes. Raises what a call raised."""
        try:
            while self.pending:
                self.collect(self.pending.popleft().result())
        finally:
            self.pending.clear()
            if self.pool is not None:
                self.at_exit.cancel()
                self.pool.shutdown(cancel_futures=True)
                self.pool = None
