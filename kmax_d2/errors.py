"""Errors that the user can fix. Each is one line that says what is wrong and what to do about it."""

import builtins
import difflib
import importlib
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import BrokenExecutor
from functools import partial
from types import TracebackType
from typing import Any


class UserError(RuntimeError):
    """A problem outside the program: a file, an option, or a dataset."""


class DownloadError(UserError):
    """A file that cannot be downloaded."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns ``" - did you mean X?"`` for the closest known name, or an empty string if none is close."""
    closest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" - did you mean {closest[0]}?" if closest else ""


def optional_package(name: str, extra: str = "") -> Any:
    """Imports a package, of one of this project's extras if any. Raises UserError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = f"'kmax_d2[{extra}]'" if extra else name
        raise UserError(f"{name} is not installed: pip install {package}") from None


def report_errors() -> None:
    """Installs an exception hook that prints the errors that users can fix as one line instead of a traceback."""
    sys.excepthook = _report
    # A log or a writer's thread that fails on a full disk says so where it is used, or is not worth the traceback.
    sys.unraisablehook = partial(_hide_file_errors, hook=sys.__unraisablehook__)
    threading.excepthook = partial(_hide_file_errors, hook=threading.__excepthook__)


def _hide_file_errors(event: Any, hook: Callable[[Any], object]) -> None:
    if not isinstance(event.exc_value, OSError):
        hook(event)


def _report(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if isinstance(error, BrokenPipeError):  # whoever read the output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    elif line := _one_line(error):
        print(line, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def _one_line(error: BaseException) -> str:
    """Returns what to show of an error, or an empty string if that is its traceback."""
    if isinstance(error, KeyboardInterrupt):
        return "\ninterrupted"
    name, text = type(error).__name__, str(error)
    if "Traceback (most recent" in text:  # from a data loader worker or another process
        name, _, text = text.strip().splitlines()[-1].partition(": ")
        name = name.rpartition(".")[-1]
    if name.endswith("MemoryError") or re.search("DefaultCPUAllocator|out of memory", text):
        reason = " ".join(text.partition(". ")[0].split()) or name
        return f"error: not enough memory ({reason}): use a smaller image, batch, or model"
    if "DataLoader worker" in text:
        reason = " ".join(text[text.index("DataLoader worker") :].split()).rstrip(".")
        return f"error: {reason}: is there enough memory? Each of DATALOADER.NUM_WORKERS processes needs some"
    ours = UserError.__name__, DownloadError.__name__
    known = isinstance(error, (UserError, OSError, BrokenExecutor)) or name in ours
    if known or issubclass(getattr(builtins, name, object), OSError):
        return f"error: {' '.join(re.sub(r'^.Errno -?[0-9]+. ', '', text).split())}"
    return ""


def hide_user_errors(record: logging.LogRecord) -> bool:
    """Filters a log: no traceback of an error that is reported as one line."""
    return not (record.exc_info and isinstance(record.exc_info[1], Exception) and _one_line(record.exc_info[1]))
