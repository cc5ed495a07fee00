"""Downloads published files once, into the cache of Detectron2's PathManager."""

import http.client
import os
import socket
import urllib.request
from urllib.parse import urlparse

from detectron2.utils.file_io import Detectron2Handler, PathManager
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.utils import HfHubHTTPError
from iopath.common.file_io import get_cache_dir

from ..errors import DownloadError, UserError
from ..hugging_face import quick_hugging_face

TIMEOUT = 10.0  # seconds without an answer
HUGGING_FACE = "hf://"  # owner/repository/file


def is_address(path: str) -> bool:
    """Tells whether a path is an address to download from."""
    return path.startswith(("http://", "https://", HUGGING_FACE, Detectron2Handler.PREFIX))


def cached_file(address: str) -> str:
    """Returns the path where PathManager caches an address: in $FVCORE_CACHE, or else in ~/.torch/iopath_cache."""
    address = address.replace(Detectron2Handler.PREFIX, Detectron2Handler.S3_DETECTRON2_PREFIX)
    folder = os.path.dirname(urlparse(address).path.lstrip("/"))
    return os.path.join(get_cache_dir(), folder, address.rsplit("/", 1)[-1])


def hub_file(repository: str, name: str) -> str:
    """Returns the local copy of a file on Hugging Face, which is downloaded once. Raises UserError if it cannot be."""
    try:
        with quick_hugging_face():
            return hf_hub_download(repository, name)
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise DownloadError(
            f"cannot download {name} of {repository} ({' '.join(str(error).split())}): run again with a network, or "
            f"copy models--{repository.replace('/', '--')} from another machine's Hugging Face cache to "
            f"{constants.HF_HUB_CACHE}"
        ) from error


def download(address: str) -> str:
    """Downloads an address unless it is in the cache, and returns the path of the local copy.

    Raises UserError where there is no network or no such file. What is interrupted leaves no file behind.
    """
    if address.startswith(HUGGING_FACE):
        *repository, name = address.removeprefix(HUGGING_FACE).split("/", 2)
        if len(repository) < 2 or not name:
            raise UserError(f"{address} is not an address: it must be {HUGGING_FACE}OWNER/REPOSITORY/FILE")
        return hub_file("/".join(repository), name)
    file = cached_file(address)
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        if not os.path.isfile(file) and address.startswith("http"):
            urllib.request.urlopen(address).close()  # fails before PathManager logs and shows a bar
        return PathManager.get_local_path(address)
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(
            f"cannot download {address} ({str(error).strip('<>')}): run again with a network, or put the file at {file}"
        ) from error
    finally:
        socket.setdefaulttimeout(previous)
