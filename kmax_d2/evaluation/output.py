"""Folders and archives of predictions, as the benchmarks' servers take them."""

import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch
from detectron2.utils import comm

from ..errors import UserError


def empty_folder(folder: Path | None) -> None:
    """Creates an empty folder, if any, on the main process, while the others wait. Raises UserError if it cannot."""
    if folder is not None and comm.is_main_process():
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"cannot create the folder {folder} for the predictions: {error.strerror}") from error
    comm.synchronize()


def archive(file: Path, *parts: Path) -> None:
    """Writes a zip file of files and whole folders in its own folder."""
    with zipfile.ZipFile(file, "w") as archived:  # PNGs are compressed already
        for part in parts:
            for member in sorted(part.rglob("*")) if part.is_dir() else [part]:
                archived.write(member, member.relative_to(file.parent))


def compact(labels: torch.Tensor, largest: int) -> np.ndarray:
    """Converts labels of 0 to `largest` to a NumPy array of the smallest integers that hold them."""
    dtype = torch.uint8 if largest < 256 else torch.int16 if largest < 1 << 15 else torch.int32
    return labels.to(dtype).cpu().numpy()
