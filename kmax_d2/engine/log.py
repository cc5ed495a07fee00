"""Detectron2's log of a run."""

import logging
import sys

from detectron2.utils import comm
from detectron2.utils.logger import setup_logger


def log_to(folder: str) -> list[logging.Handler]:
    """Sets up the log of a run, on the terminal and in `folder`, as Detectron2's `default_setup` does after it.

    Returns the handlers of the terminal, for a program that wants less there.
    """
    rank = comm.get_rank()  # the same calls as in default_setup, which then adds no handlers of its own
    loggers = (setup_logger(folder, distributed_rank=rank, name="fvcore"), setup_logger(folder, distributed_rank=rank))
    for handler in loggers[-1].handlers:
        if getattr(handler, "stream", None) is not sys.stdout:
            logging.getLogger("kmax_d2").addHandler(handler)
    return [handler for log in loggers for handler in log.handlers if getattr(handler, "stream", None) is sys.stdout]


def quiet_log(folder: str) -> None:
    """Sets up the log of a run that shows its progress itself: only Detectron2's warnings go to the terminal."""
    setup_logger(name="kmax_d2")
    for handler in log_to(folder):
        handler.setLevel(logging.WARNING)
