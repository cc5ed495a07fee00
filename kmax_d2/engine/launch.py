"""Detectron2's launch, also under torchrun, with processes that end together and in order."""

import contextlib
import logging
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import cast

import torch
import torch.distributed as dist
from detectron2.engine import launch as d2_launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch.distributed.rendezvous import rendezvous
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from ..errors import UserError
from ..parallel import SIGNALS
from ..speed import keep_freed_memory
from .stop import STOPPED

logger = logging.getLogger(__name__)


def launch(
    function: Callable, num_gpus_per_machine: int, *, num_machines: int = 1, args: tuple = (), **options
) -> None:
    """Runs Detectron2's launch, which takes the same arguments, or in the processes that torchrun has started.

    Ends with status STOPPED if a signal stopped the training, and with 128 + its number if one killed the processes.
    Raises UserError if the number of processes is wrong, they do not find each other, or one of them was killed.
    """
    if num_gpus_per_machine < 1 or num_machines < 1:
        raise UserError("--num-gpus and --num-machines must be at least 1; without a GPU, a process trains on the CPU")
    if torch.cuda.is_available() and num_gpus_per_machine > torch.cuda.device_count():
        raise UserError(f"--num-gpus is {num_gpus_per_machine}, but this machine has {torch.cuda.device_count()}")
    if not 0 <= options.get("machine_rank", 0) < num_machines:
        raise UserError(f"--machine-rank is {options['machine_rank']}, but must be from 0 to {num_machines - 1}")
    if dist.is_torchelastic_launched():
        if num_gpus_per_machine * num_machines > 1:
            raise UserError("torchrun starts the processes: leave out --num-gpus and --num-machines")
        _run_in_torchrun(function, args)
        return
    if num_gpus_per_machine * num_machines == 1:
        _run(function, args)
        return
    url = re.fullmatch(r"tcp://(?:\[[^]]+\]|[^:/]+):(\d{1,5})/?", options["dist_url"])
    if not (url and 0 < int(url[1]) < 2**16) and not re.match("auto$|env://|file://", options["dist_url"]):
        raise UserError(f"--dist-url is {options['dist_url']}, but must be as tcp://ADDRESS-OF-MACHINE-0:29500")
    if num_machines > 1:
        logger.warning(
            f"waiting at {options['dist_url']} for all {num_machines} machines of {num_gpus_per_machine} processes "
            f"each, {DEFAULT_TIMEOUT.seconds // 60} minutes at most"
        )
    received: list[int] = []
    try:
        with _signals_passed_on(received):
            d2_launch(_run, num_gpus_per_machine, num_machines=num_machines, args=(function, args), **options)
    except ProcessExitedException as error:
        if error.exit_code == STOPPED:
            sys.exit(STOPPED)
        if received:
            sys.exit(128 + received[-1])
        raise UserError(f"training ended: {error}; continue with --resume") from error
    except ProcessRaisedException as error:
        unmet = re.search(r"torch\.distributed\.Dist(?:Store|Network)Error: (.+)", str(error))
        if unmet is None:
            raise
        raise UserError(f"the processes did not meet at {options['dist_url']}: {unmet[1]}") from error


def _run_in_torchrun(function: Callable, args: tuple) -> None:
    if int(os.environ["WORLD_SIZE"]) > 1:
        store, rank, world_size = next(rendezvous("env://", timeout=DEFAULT_TIMEOUT))
        if os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True":
            # It outlives a restart, and so do the addresses in it of processes that are gone.
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        on_gpu = torch.cuda.is_available()
        backend = "nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=DEFAULT_TIMEOUT)
        # As comm.create_local_process_group does, which Detectron2's 0.6 release lacks.
        comm._LOCAL_PROCESS_GROUP, _ = dist.new_subgroups(int(os.environ["LOCAL_WORLD_SIZE"]))
        if on_gpu:
            torch.cuda.set_device(comm.get_local_rank())
        comm.synchronize()
    _run(function, args)


@contextlib.contextmanager
def _signals_passed_on(received: list[int]) -> Iterator[None]:
    """Passes signals on to the processes that this one has started, notes them, and goes on waiting."""

    def pass_on(number: int, frame: object) -> None:
        received.append(number)
        children = multiprocessing.active_children()
        for child in children:
            os.kill(cast(int, child.pid), number)
        if not children:
            signal.signal(number, earlier[number])
            signal.raise_signal(number)

    earlier = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _run(function: Callable, args: tuple) -> None:
    keep_freed_memory()  # in every process
    if multiprocessing.parent_process() is not None and hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C reaches the parent, which passes it on once
    function(*args)
    if dist.is_initialized():
        # Otherwise process group threads that outlive the interpreter, or a peer that is gone, abort the process.
        comm.synchronize()
        dist.destroy_process_group()
