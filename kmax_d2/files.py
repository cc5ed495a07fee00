"""Writes files that are complete or absent and never over those of the user, and locks the folder of a run."""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .errors import UserError

MARK = "made by kmax_d2"  # in the first or last bytes of the results, which tells them from files of the user
MARK_BYTES = 4096  # at each end of a file, in which the mark is looked for


@contextlib.contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """Gives a temporary path to write to, and renames it to `file` once the block ends without an error.

    The temporary file is in the same folder, which is created if need be, and has the same suffix. Its content is on
    the disk before the renaming, and the new name afterwards. After an error it is gone, and an earlier `file` is as
    it was. Raises UserError if the file cannot be written.
    """
    unfinished = file.with_name(f".{file.stem}.{os.getpid()}.part{file.suffix}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        with open(unfinished, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(unfinished, file)
        with contextlib.suppress(OSError):  # Windows cannot open a folder
            folder = os.open(file.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def write_text(file: Path, text: str) -> None:
    """Writes a text file in UTF-8 by :func:`whole_file`."""
    with whole_file(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(file: Path, content: object, indent: int | None = None) -> None:
    """Writes `content` as a JSON file by :func:`whole_file`."""
    write_text(file, json.dumps(content, indent=indent))


def make_folder(folder: Path) -> Path:
    """Creates a folder unless it exists, and returns it. Raises UserError on failure."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {folder}: {error.strerror}") from error
    return folder


def lock_folder(folder: Path) -> None:
    """Claims a folder for this process until it ends, and removes what :func:`whole_file` left unfinished in it.

    Raises UserError while another process holds the folder. Without file locks (Windows), it only creates the folder.
    """
    make_folder(folder)
    with contextlib.suppress(ImportError):
        import fcntl

        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)  # stays open: the kernel unlocks it at exit
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise UserError(f"another run writes to {folder}: wait for it, or set another OUTPUT_DIR") from None
        for file in folder.glob(".*.part*"):
            unfinished = re.fullmatch(r"\..+\.(\d+)\.part(\.[^.]*)?", file.name)
            if unfinished and file.is_file() and not _runs(int(unfinished[1])):
                file.unlink()


def _runs(pid: int) -> bool:
    """Returns whether there is a process with this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it belongs to another user, or the number is too large for a process
        pass
    return True


def write_png(file: Path, image: np.ndarray, **texts: str) -> None:
    """Writes an image (H, W) or (H, W, 3), uint8, as a PNG with the mark and further texts by :func:`whole_file`."""
    info = PngInfo()
    for name, text in ({"Comment": MARK} | texts).items():
        info.add_text(name, text)
    with whole_file(file) as unfinished:
        Image.fromarray(image).save(unfinished, "PNG", pnginfo=info)


def require_own(files: Iterable[Path], overwrite: bool = False) -> None:
    """Raises UserError for the first file that exists and is not marked as ours; `overwrite` allows all."""
    for file in () if overwrite else files:
        if file.exists() and MARK.encode() not in _ends(file):
            raise UserError(f"{file} exists and was not made by kmax_d2: choose another name, or add --overwrite")


def own_folder(folder: Path) -> Path:
    """Claims a folder for results, creating it if need be; only an empty one, or one that was claimed before.

    Raises UserError for any other folder.
    """
    claim = make_folder(folder) / ".kmax_d2"
    if any(folder.iterdir()) and not claim.exists():
        raise UserError(f"{folder} is not empty and was not made by kmax_d2: choose another folder")
    write_text(claim, MARK)
    return folder


def _ends(file: Path) -> bytes:
    try:
        with open(file, "rb") as stream:
            head = stream.read(MARK_BYTES)
            stream.seek(max(0, os.path.getsize(file) - MARK_BYTES))
            return head + stream.read()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
