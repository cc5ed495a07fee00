"""Downloads published files once, into the cache of Detectron2's PathManager."""

from __future__ import annotations

import http.client
import os
import socket
import urllib.request
from urllib.parse import urlparse

from detectron2.utils.file_io import Detectron2Handler, PathManager
from iopath.common.file_io import get_cache_dir

from ..errors import UserError

TIMEOUT = 10.0  # seconds without an answer


def is_address(path: str) -> bool:
    """Tells whether a path is an address to download from."""
    return path.startswith(("http://", "https://", Detectron2Handler.PREFIX))


def cached_file(address: str) -> str:
    """Returns the path where PathManager caches an address: in $FVCORE_CACHE, or else in ~/.torch/iopath_cache."""
    address = address.replace(Detectron2Handler.PREFIX, Detectron2Handler.S3_DETECTRON2_PREFIX)
    folder = os.path.dirname(urlparse(address).path.lstrip("/"))
    return os.path.join(get_cache_dir(), folder, address.rsplit("/", 1)[-1])


def download(address: str) -> str:
    """Downloads an address unless it is in the cache, and returns the path of the local copy.

    Raises UserError where there is no network or no such file. What is interrupted leaves no file behind.
    """
    file = cached_file(address)
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        if not os.path.isfile(file) and address.startswith("http"):
            urllib.request.urlopen(address).close()  # fails before PathManager logs and shows a bar
        return PathManager.get_local_path(address)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"cannot download {address} ({str(error).strip('<>')}): run again with a network, or put the file at {file}"
        ) from error
    finally:
        socket.setdefaulttimeout(previous)
