"""Finding image files."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from .errors import UserError


def images_in(folder: Path) -> list[Path]:
    """Returns the image files of a folder, by their suffix, sorted. Raises UserError if there are none."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}")
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix.lower() in known)
    if not files:
        raise UserError(f"no images in the folder {folder}")
    return files


def find_images(inputs: Iterable[str]) -> tuple[list[Path], list[UserError]]:
    """Returns the files that files, folders, and patterns name, each once, and an error for each that names none."""
    found: dict[Path, Path] = {}
    errors = []
    for name in inputs:
        try:
            files = [Path(name)] if os.path.isfile(name) else _search(name)
        except UserError as error:
            errors.append(error)
        else:
            found |= {file.resolve(): file for file in files if file.resolve() not in found}
    return list(found.values()), errors


def _search(name: str) -> list[Path]:
    if os.path.isdir(name):
        return images_in(Path(name))
    matches = [Path(match) for match in sorted(glob.glob(name, recursive=True)) if os.path.isfile(match)]
    if not matches:
        raise UserError(f"no file matches {name}" if glob.has_magic(name) else f"no file {name}")
    return matches
