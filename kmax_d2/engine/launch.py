"""Detectron2's launch, whose processes end together and in order."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from detectron2.engine import launch as d2_launch
from detectron2.utils import comm


def launch(function: Callable, num_gpus_per_machine: int, *, args: tuple = (), **options) -> object:
    """Runs `function(*args)` in as many processes as asked for; arguments as for :func:`detectron2.engine.launch`."""
    return d2_launch(_run, num_gpus_per_machine, args=(function, args), **options)


def _run(function: Callable, args: tuple) -> object:
    result = function(*args)
    if dist.is_initialized():
        # Threads of a process group that outlive the interpreter, or a peer that is gone, abort a finished process.
        comm.synchronize()
        dist.destroy_process_group()
    return result
