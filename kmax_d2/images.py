"""Finds and reads image files."""

import contextlib
import glob
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from .errors import UserError

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def _opened(file: str | IO[bytes] | Image.Image, what: str, gray: bool) -> Iterator[Image.Image]:
    """Opens an image, unless it is one. Any failure, including one inside the block, is a UserError that names it."""
    try:
        if isinstance(file, str) and os.path.exists(file) and not os.path.isfile(file):
            raise UserError(f"cannot read the {what}: it is not a file")
        with contextlib.nullcontext(file) if isinstance(file, Image.Image) else Image.open(file) as image:
            if image.mode == "F" or image.mode.startswith("I"):  # Pillow would clip the values at 255
                raise UserError(f"the {what} has more than 8 bits per channel; convert it to 8 bits first")
            if not gray and image.mode not in ("RGB", "RGBA", "P"):
                raise UserError(f"the {what} has no colors: its mode is {image.mode}, not RGB")
            yield image
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"cannot read the {what}: it is not an image") from error
    except Exception as error:  # Pillow's readers raise almost anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"cannot read the {what}: {reason}") from error


def read_rgb(
    file: str | IO[bytes] | Image.Image,
    what: str = "image",
    gray: bool = True,
    name: str = "",
    size: tuple[int, ...] = (),
) -> np.ndarray:
    """Reads an image file whole, or an image of Pillow's: RGB (H, W, 3), uint8, upright by its EXIF orientation.

    Of several frames in a file it is the first.

    Raises UserError with its name (`name`, else the path) and `what` it is, if it is damaged, not an image, has more
    than 8 bits a channel, is gray where that is not allowed, or, given the (height, width) `size` of the image that it
    annotates, has another.
    """
    what = f"{what} {name or file}"
    with _opened(file, what, gray) as image:
        if image is file:  # in memory, with a frame chosen
            return _upright(image)
        if (frames := getattr(image, "n_frames", 1)) > 1:
            logger.warning(f"the {what} has {frames} frames: only the first is used")
        if image.format == "PNG":
            image.verify()  # the checksums, which loading passes over; the image must then be opened again
    with _opened(file, what, gray) as image:
        pixels = _upright(image)
    if size and pixels.shape[:2] != size:
        raise UserError(f"the {what} is {pixels.shape[1]}×{pixels.shape[0]}, but its image is {size[1]}×{size[0]}")
    return pixels


def _upright(image: Image.Image) -> np.ndarray:
    """Returns RGB (H, W, 3), uint8, turned by the EXIF orientation."""
    image.load()  # before anything that would hide an error
    if image.mode in ("RGBa", "La"):  # colors that are multiplied by their alpha, which convert to nothing else
        return np.asarray(ImageOps.exif_transpose(image).convert(image.mode.upper()).convert("RGB"))
    return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def read_size(file: str, what: str = "image", gray: bool = True) -> tuple[int, int]:
    """Reads from a file's header the (height, width) of :func:`read_rgb`; raises UserError as far as that shows."""
    with _opened(file, f"{what} {file}", gray) as image:
        # Without EXIF in its header, a PNG would be decoded to look for it at the end.
        exif = image.getexif() if image.format != "PNG" or "exif" in image.info else {}
        turned = exif.get(ExifTags.Base.Orientation) in range(5, 9)
        return image.size if turned else (image.height, image.width)


def images_in(folder: Path) -> list[Path]:
    """Returns the image files of a folder, by their suffix, sorted. Raises UserError if there are none."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}")
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix.lower() in known)
    if not files:
        raise UserError(f"no images in the folder {folder}")
    return files


def is_web_address(source: Any) -> bool:
    """Tells whether a source is an http address."""
    return isinstance(source, str) and source.startswith(("http://", "https://"))


def stem_of(source: str) -> str:
    """Returns the name of a file or of what is at an address without its suffix."""
    return Path(urlsplit(source).path if is_web_address(source) else source).stem or "image"


def find_images(inputs: Iterable[str]) -> tuple[list[str], list[UserError]]:
    """Returns what files, folders, patterns, and addresses name, each once, and an error for each that names none."""
    found: dict[Path, str] = {}
    errors = []
    for name in inputs:
        try:
            files = [name] if os.path.isfile(name) or is_web_address(name) else _search(name)
        except UserError as error:
            errors.append(error)
        else:
            for file in files:
                found.setdefault(Path(file).resolve(), str(file))
    return list(found.values()), errors


def _search(name: str) -> list[str]:
    if os.path.isdir(name):
        return [str(file) for file in images_in(Path(name))]
    matches = [match for match in sorted(glob.glob(name, recursive=True)) if os.path.isfile(match)]
    if not matches:
        raise UserError(f"no file matches {name}" if glob.has_magic(name) else f"no file {name}")
    return matches
