"""A signal ends training after the current step, with a checkpoint."""

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm

from ..parallel import SIGNALS

STOPPED = 75  # exit status: stopped by a signal, `--resume` continues (EX_TEMPFAIL of sysexits.h)
SAME = 1.0  # seconds in which signals count as one: some senders reach a process both directly and by its launcher
_EARLIER: dict[int, Any] = {}  # the handlers before those of a StopOnSignal


def _restore_handlers() -> None:
    """Gives a forked process the earlier handlers: a pool ends its processes by SIGTERM and waits for them."""
    for number, handler in _EARLIER.items():
        signal.signal(number, handler)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_restore_handlers)


class StopOnSignal(HookBase):
    """At SIGTERM, SIGINT, or SIGUSR1 finishes the step, saves a checkpoint, and exits with status STOPPED everywhere.

    An evaluation is not finished. A second signal, at least SAME seconds later, ends the process at once. Register it
    just before the evaluation.
    """

    def before_train(self) -> None:
        """Installs the handlers, where Python allows that: in the main thread."""
        self._received, self._between_steps = 0.0, False
        if threading.current_thread() is threading.main_thread():
            _EARLIER.update({number: signal.signal(number, self._receive) for number in SIGNALS})

    @property
    def received(self) -> bool:
        """Whether a signal came."""
        return self._received > 0

    def before_step(self) -> None:
        """From here on, a signal waits for the end of the step."""
        self._between_steps = False

    def after_step(self) -> None:
        """Stops if any process got a signal."""
        if any(comm.all_gather(self._received > 0)):
            self.trainer.save_last_step()
            comm.synchronize()  # no process ends while another one saves
            sys.exit(STOPPED)
        self._between_steps = True

    def after_train(self) -> None:
        """Puts the earlier handlers back, unless a signal ended the run: it may come again before the process ends."""
        if not self._received:
            _restore_handlers()
            _EARLIER.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            if time.monotonic() - self._received >= SAME:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self._received = time.monotonic()
        if self._between_steps and comm.is_main_process():
            self.trainer.save_last_step()
            sys.exit(STOPPED)
