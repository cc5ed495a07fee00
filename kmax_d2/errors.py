"""Errors that the user can fix. Each is one line that says what is wrong and what to do about it."""

import builtins
import difflib
import importlib
import logging
import os
import re
import sys
from collections.abc import Iterable
from concurrent.futures import BrokenExecutor
from types import TracebackType
from typing import Any


class UserError(RuntimeError):
    """A problem outside the program: a file, an option, or a dataset."""


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
    """From here on, what ends this process and the user can mend or has caused is one line instead of a traceback."""
    sys.excepthook = _report


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
    known = isinstance(error, (UserError, OSError, BrokenExecutor)) or name == UserError.__name__
    if known or issubclass(getattr(builtins, name, object), OSError):
        return f"error: {' '.join(re.sub(r'^.Errno -?[0-9]+. ', '', text).split())}"
    return ""


def hide_user_errors(record: logging.LogRecord) -> bool:
    """Filters a log: no traceback of a UserError, which is reported as one line."""
    return not (record.exc_info and isinstance(record.exc_info[1], UserError))
