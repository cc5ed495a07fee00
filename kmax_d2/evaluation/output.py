"""Where predictions are written: a folder for a benchmark's server, or one that is gone after each image."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from detectron2.utils import comm

from ..errors import UserError


@contextlib.contextmanager
def target(folder: Path | None) -> Iterator[Path]:
    """The folder; without one, a new one that is deleted after use."""
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="kmax_d2_") as scratch:
        yield Path(scratch)


def start(folder: Path | None) -> None:
    """Makes a folder anew on the main process, where predictions are kept; the other processes wait."""
    if folder is not None and comm.is_main_process():
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {folder} for the predictions: {error.strerror}") from error
    comm.synchronize()


def archive(file: Path, *parts: Path) -> None:
    """A zip file of files and whole folders beside it."""
    with zipfile.ZipFile(file, "w") as archived:  # PNGs are as small as they get: no second compression
        for part in parts:
            for member in sorted(part.rglob("*")) if part.is_dir() else [part]:
                archived.write(member, member.relative_to(file.parent))


def narrow(labels: torch.Tensor, largest: int):
    """Labels of 0 to `largest` as a NumPy array of the smallest integers that hold them, cheap to hand on."""
    dtype = torch.uint8 if largest < 256 else torch.int16 if largest < 1 << 15 else torch.int32
    return labels.to(dtype).cpu().numpy()
