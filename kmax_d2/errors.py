"""Errors that the user can fix. Each is one line that says what is wrong and what to do about it."""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Callable, Iterable


class UserError(RuntimeError):
    """A problem outside the program: a file, an option, or a dataset."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns ``" - did you mean X?"`` for the closest known name, or an empty string if none is close."""
    closest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" - did you mean {closest[0]}?" if closest else ""


def exit_on_user_error(main: Callable[[], object]) -> None:
    """Runs a program's main function; a UserError prints its one line and exits with status 1."""
    try:
        main()
    except Exception as error:
        # From a data loader worker or another process, it arrives as text that starts with the traceback.
        marker = f"{UserError.__qualname__}: "
        if not isinstance(error, UserError) and marker not in str(error):
            raise
        sys.exit(f"error: {str(error).rsplit(marker, 1)[-1].strip()}")


class HideUserErrors(logging.Filter):
    """Keeps the traceback of a UserError, which is reported as one line, out of a log."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns False for a record that logs a UserError."""
        return not (record.exc_info and isinstance(record.exc_info[1], UserError))
