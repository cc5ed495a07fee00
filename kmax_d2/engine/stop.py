"""A signal ends training after the current step, with a checkpoint."""

import os
import signal
import sys
import threading
import time
from types import FrameType

from detectron2.engine import HookBase
from detectron2.utils import comm

STOPPED = 75  # exit status: stopped by a signal, `--resume` continues (EX_TEMPFAIL of sysexits.h)
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
SAME = 1.0  # seconds in which signals count as one: some senders reach a process both directly and by its launcher


class StopOnSignal(HookBase):
    """At SIGTERM, SIGINT, or SIGUSR1 finishes the step, saves a checkpoint, and exits with status STOPPED everywhere.

    An evaluation is not finished. A second signal, at least SAME seconds later, ends the process at once. Register it
    just before the evaluation.
    """

    def before_train(self) -> None:
        """Installs the handlers, where Python allows that: in the main thread."""
        self._received, self._between_steps, self._pid = 0.0, False, os.getpid()
        self._earlier = {}
        if threading.current_thread() is threading.main_thread():
            self._earlier = {number: signal.signal(number, self._receive) for number in SIGNALS}

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
        for number, handler in self._earlier.items() if not self._received else ():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a worker of the data loader, which lives as long as its parent
        if self._received:
            if time.monotonic() - self._received >= SAME:
                signal.signal(number, signal.SIG_DFL)
                os.kill(self._pid, number)
            return
        self._received = time.monotonic()
        if self._between_steps and comm.is_main_process():
            self.trainer.save_last_step()
            sys.exit(STOPPED)
