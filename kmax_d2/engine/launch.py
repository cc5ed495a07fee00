"""Detectron2's launch, with processes that end together and in order."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from detectron2.engine import launch as d2_launch
from detectron2.utils import comm

from ..speed import keep_freed_memory


def launch(function: Callable, num_gpus_per_machine: int, *, args: tuple = (), **options) -> object:
    """Runs ``function(*args)`` in as many processes as requested.

    Args:
        function, num_gpus_per_machine, args, options: as for :func:`detectron2.engine.launch`.
    """
    return d2_launch(_run, num_gpus_per_machine, args=(function, args), **options)


def _run(function: Callable, args: tuple) -> object:
    keep_freed_memory()  # in every process
    result = function(*args)
    if dist.is_initialized():
        # Otherwise process group threads that outlive the interpreter, or a peer that is gone, abort the process.
        comm.synchronize()
        dist.destroy_process_group()
    return result
