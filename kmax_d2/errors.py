"""Errors that are the user's to mend, each one line that says what is wrong and what to do."""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Callable, Iterable


class UserError(RuntimeError):
    """Something outside the program is wrong: a file, an option, a dataset."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " - did you mean X?" for the nearest known name, or nothing if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" - did you mean {near[0]}?" if near else ""


def exit_on_user_error(main: Callable[[], object]) -> None:
    """Runs a command line's main function; a UserError ends it with its one line and exit status 1."""
    try:
        main()
    except Exception as error:
        # From a data loader's worker or another process it comes as a text, with the traceback there before it.
        marker = f"{UserError.__qualname__}: "
        if not isinstance(error, UserError) and marker not in str(error):
            raise
        sys.exit(f"error: {str(error).rsplit(marker, 1)[-1].strip()}")


class HideUserErrors(logging.Filter):
    """Keeps the traceback of a UserError, which is shown as one line, out of a log."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], UserError))
