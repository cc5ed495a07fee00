"""Errors that are the user's to mend, each one line that says what is wrong and what to do."""

from __future__ import annotations

import difflib
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
    except UserError as error:
        sys.exit(f"error: {error}")
