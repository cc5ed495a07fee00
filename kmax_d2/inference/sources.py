"""Images from wherever they are: files, addresses, and memory."""

import http.client
import io
import os
import urllib.request
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image

from ..errors import UserError
from ..images import is_web_address, read_rgb

Source: TypeAlias = "str | Path | Image.Image | np.ndarray | torch.Tensor"
TIMEOUT = 10.0  # seconds without an answer
MOST_BYTES = 2**28  # of a downloaded image


def read_source(source: Source) -> tuple[np.ndarray, str]:
    """Reads an image.

    Args:
        source: a file's path, a web address, a PIL image, an RGB array (H, W, 3), or a tensor (3, H, W), both uint8.

    Returns:
        RGB (H, W, 3), uint8, and the path or address, else "".

    Raises:
        UserError: it cannot be read, or is something else.
    """
    if is_web_address(source):
        return read_rgb(_download(str(source)), name=str(source)), str(source)
    if isinstance(source, (str, os.PathLike)):
        return read_rgb(str(source)), str(source)
    if isinstance(source, Image.Image):
        return read_rgb(source, name="of PIL"), ""
    if isinstance(source, torch.Tensor) and source.ndim == 3 and source.shape[0] == 3:
        source = source.permute(1, 2, 0).cpu().numpy()
    shape = source.shape if isinstance(source, np.ndarray) and source.dtype == np.uint8 else ()
    if len(shape) == 3 and shape[2] == 3 and min(shape) > 0:
        return np.ascontiguousarray(source), ""
    kind = f"{type(source).__name__} {tuple(getattr(source, 'shape', ()))} {getattr(source, 'dtype', '')}".strip()
    raise UserError(f"no image: a path, an address, a PIL image, RGB uint8 (H, W, 3) or (3, H, W), but not {kind}")


def _download(address: str) -> io.BytesIO:
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT) as stream:
            content = stream.read(MOST_BYTES + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"cannot download {address}: {str(error).strip('<>')}") from error
    if len(content) > MOST_BYTES:
        raise UserError(f"{address} is larger than {MOST_BYTES >> 20} MiB")
    return io.BytesIO(content)
