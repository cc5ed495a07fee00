"""Writes files that are complete or absent, never cut short."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError


@contextlib.contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """Gives a temporary path to write to, and renames it to `file` once the block ends without an error.

    The temporary file is in the same folder, which is created if need be, and has the same suffix. Its content is on
    the disk before the renaming. After an error it is gone, and an earlier `file` is as it was.

    Raises:
        UserError: the file cannot be written.
    """
    unfinished = file.with_name(f".{file.stem}.{os.getpid()}.part{file.suffix}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        with open(unfinished, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(unfinished, file)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def write_json(file: Path, content: object, indent: int | None = None) -> None:
    """Writes `content` as a JSON file by :func:`whole_file`."""
    with whole_file(file) as unfinished:
        unfinished.write_text(json.dumps(content, indent=indent))


def make_folder(folder: Path) -> Path:
    """Creates a folder unless it exists, and returns it. Raises UserError on failure."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {folder}: {error.strerror}") from error
    return folder
