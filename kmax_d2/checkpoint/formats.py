"""Reads weights of every published format, recognized by what the file holds and not by its name."""

import logging
import lzma
import os
import pickle
import re
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from safetensors.torch import load_file

from ..data.datasets.coco_panoptic import things_of
from ..errors import DownloadError, UserError
from .class_rows import published_metadata
from .deeplab2 import CLASS_BIAS, deeplab2_to_state_dict
from .download import download, is_address
from .imagenet import imagenet_to_state_dict, is_imagenet, load_timm
from .pickles import load_pickle, numpy_in_torch
from .pytorch_port import check_port_options, is_port, port_to_state_dict
from .tensor_bundle import read_variables
from .wrappers import find_weights, strip_prefix

logger = logging.getLogger(__name__)

TIMM = "timm://"
MOST_UNPACKED = 50  # weights hardly compress, so more is not a checkpoint but fills the disk
_BUNDLE_FILE = re.compile(r"(.*)\.(?:index|data-\d+-of-\d+)")
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save's files began before they were zip


def read_checkpoint(path: str, model: Any, *, resume: bool = False) -> dict:
    """Reads what MODEL.WEIGHTS names.

    Raises UserError if the file is missing, damaged, or not a checkpoint, or its weights need other options of the
    model.

    Args:
        path: a file, an address, the prefix of a TensorFlow checkpoint such as ".../ckpt-150000", or "timm://NAME".
        model: the :class:`~kmax_d2.modeling.KMaXDeepLab` that the weights are for.
        resume: whether the training state is needed too. Otherwise the tensors may be views of the file.

    Returns:
        "model": a state dict with our names; for one of our own checkpoints also its other entries, such as "trainer";
        for published weights also "classes", their class names.
    """
    if path.startswith(TIMM):
        return {"model": load_timm(path.removeprefix(TIMM), model.pixel_mean, model.pixel_std)}
    checkpoint, own = read_entries(path, resume=resume), model.state_dict()
    prefix, checkpoint["model"] = strip_prefix(checkpoint["model"], own.keys(), path)
    if prefix:
        logger.info(f"the weights of {path} are those that begin with {prefix}")
    try:
        checkpoint = _in_our_names(checkpoint, model)
    except UserError:
        raise
    except Exception as error:  # shapes can be wrong in any way
        raise UserError(f"{path} has the names of published weights, but other shapes ({error})") from error
    for name, value in checkpoint["model"].items():
        if name in own and own[name].is_floating_point() and not value.is_floating_point():
            raise UserError(f"{path} has whole numbers ({value.dtype}) as the weights {name}")
    return checkpoint


def read_entries(path: str, *, resume: bool = False) -> dict:
    """Reads a file or an address as :func:`read_checkpoint` does, but leaves the weights as they are named there."""
    try:
        file = download(path) if is_address(path) else PathManager.get_local_path(path)
    except (RuntimeError, OSError, LookupError, ValueError) as error:  # of Detectron2's catalogs
        raise error if isinstance(error, UserError) else UserError(f"cannot get {path}: {error}") from error
    try:
        return _read(file, resume)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error
    except UserError as error:
        if not is_address(path):
            raise
        Path(file).unlink(missing_ok=True)
        raise DownloadError(f"{path} gave no checkpoint: {error}. It was removed; run again for a new copy") from error


def _in_our_names(checkpoint: dict, model: Any) -> dict:
    """Converts the weights by the names that they have."""
    weights = checkpoint["model"]
    if any("/" in name for name in weights):
        published = published_metadata(len(weights.get(CLASS_BIAS, [0])) - 1)
        is_thing = model.merging.is_thing.tolist()
        if published is not None:
            is_thing = [index in things_of(published) for index in range(len(published.stuff_classes))]
        return _named(deeplab2_to_state_dict(weights, is_thing))
    weights = {name: torch.as_tensor(value) for name, value in weights.items()}
    if is_port(weights):
        check_port_options(model)
        return _named(port_to_state_dict(weights))
    if is_imagenet(weights) and not type(model.backbone).__module__.startswith("kmax_d2."):
        return checkpoint | {"model": weights, "matching_heuristics": True}  # Detectron2 finds the names
    if is_imagenet(weights):
        return {"model": imagenet_to_state_dict(weights, model.pixel_mean, model.pixel_std)}
    return checkpoint | {"model": weights}


def _named(weights: dict) -> dict:
    """Adds the class names of the published dataset with as many classes, if there is one."""
    counts = {len(weight) - 1 for name, weight in weights.items() if name.endswith("class_head.bias")}
    published = published_metadata(min(counts)) if counts else None
    return {"model": weights} | ({"classes": published.stuff_classes} if published is not None else {})


def _read(file: str, resume: bool) -> dict:
    """Reads a file by its content: a dict with "model" and, for one of our own checkpoints, its other entries."""
    bundle = _BUNDLE_FILE.fullmatch(file)
    prefix = bundle[1] if bundle else file
    if os.path.isfile(f"{prefix}.index"):
        return {"model": read_variables(prefix)}
    if os.path.isdir(file):
        files = sorted(os.listdir(file))
        inside = _newest_prefix(files) or next((name for name in files if name.endswith((".safetensors", ".pth"))), "")
        hint = f" - did you mean {os.path.join(file, inside)}?" if inside else ""
        raise UserError(f"{file} is not a readable checkpoint: it is a folder{hint}")
    if not os.path.isfile(file):
        raise UserError(f"no checkpoint {file}")
    with open(file, "rb") as stream:
        head = stream.read(512)
    if head and tarfile.is_tarfile(file):
        return {"model": _read_archive(file)}
    is_zip = head.startswith(b"PK\x03\x04")
    loaded: object
    if file.endswith(".safetensors") or head[8:9] == b"{":  # the length of its header, then the header in JSON
        try:
            loaded = load_file(file)
        except Exception as error:  # such as a type of numbers that PyTorch does not have
            raise _unreadable(file, error) from error
    elif is_zip or head.startswith(_LEGACY_TORCH):
        loaded = _read_torch(file, is_zip, resume)
    elif head.startswith(b"\x80"):
        loaded = _read_pickle(file)
    else:
        raise UserError(f"{file} is not a readable checkpoint: it is {_kind(head)}")
    place, weights = find_weights(loaded, file)
    if place not in ("", "model"):
        logger.info(f"{file} has its weights in {place}")
    others = dict(dict.items(cast(dict, loaded))) if place == "model" else {}
    return others | {"model": weights}


def _kind(head: bytes) -> str:
    """Names the kind of file that begins with `head`, among those often found in place of a checkpoint."""
    if not head:
        return "empty"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page"
    if head.startswith(b"\x1f\x8b"):
        return "a gzip file without an archive in it"
    control = set(range(32)) - set(b"\t\n\r\f")
    return "a file of unknown format" if control & set(head) else "a text file"


def _unreadable(file: str, error: Exception) -> UserError:
    """Words what a library said about a file as one line."""
    words = str(error).rpartition("WeightsUnpickler error:")[2]  # what is before them is PyTorch's advice to trust it
    reason = " ".join(words[:500].split())  # a damaged name may be megabytes long
    call = re.search(r"GLOBAL (\S+)", reason) if isinstance(error, pickle.UnpicklingError) else None
    if call is not None:
        return UserError(
            f"{file} is not read: besides tensors it holds {call[1]}, which could run code; save the weights alone, as "
            "with torch.save(model.state_dict(), FILE)"
        )
    return UserError(f"{file} is not a readable checkpoint: it is damaged, cut short, or of another kind ({reason})")


def _read_torch(file: str, is_zip: bool, resume: bool) -> object:
    """Reads what torch.save wrote."""
    if is_zip and not zipfile.is_zipfile(file):
        raise _unreadable(file, ValueError("a zip archive without its end"))
    try:
        if is_zip:
            _verify(file)
        with numpy_in_torch():
            # A training state must not be a view of a file that the run may overwrite.
            return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip and not resume)
    except Exception as error:  # damaged bytes are instructions, which can fail in any way
        raise _unreadable(file, error) from error


def _verify(file: str) -> None:
    """Verifies the checksums of a zip archive, which PyTorch does not. Raises an error if one is wrong."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > os.path.getsize(file):
            raise ValueError("its entries are compressed or overlap")
        for member in members:
            with archive.open(member) as stream:
                while member.CRC and stream.read(2**20):  # 0 if PyTorch was set to compute none
                    pass


def _read_pickle(file: str) -> object:
    """Reads Detectron2's .pkl files: {"model": arrays by name, "__author__": ...}, or Caffe2's arrays by name."""
    with open(file, "rb") as stream:
        try:
            loaded = load_pickle(stream)
        except Exception as error:  # damaged bytes are instructions, which can fail in any way
            raise _unreadable(file, error) from error
    if not isinstance(loaded, dict) or "model" in loaded:
        return loaded
    arrays = loaded.get("blobs", loaded)
    if not isinstance(arrays, dict):
        return arrays
    return {name: array for name, array in arrays.items() if not str(name).endswith("_momentum")}


def _read_archive(file: str) -> dict[str, np.ndarray]:
    """Reads the variables of the newest TensorFlow checkpoint in a tar archive."""
    with tempfile.TemporaryDirectory(prefix="kmax_d2_") as folder:
        unpacked = 0
        try:
            with tarfile.open(file, "r|*") as archive:  # a stream: seeking would start over
                for member in archive:
                    name = PurePosixPath(member.name).name
                    if not member.isfile() or not name.startswith("ckpt") or not _BUNDLE_FILE.fullmatch(name):
                        continue
                    unpacked += member.size
                    if unpacked > MOST_UNPACKED * os.path.getsize(file):
                        raise UserError(f"{file} is not read: it unpacks to over {MOST_UNPACKED} times its size")
                    with open(os.path.join(folder, name), "wb") as out:
                        shutil.copyfileobj(cast(IO[bytes], archive.extractfile(member)), out)
        except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise _unreadable(file, error) from error
        prefix = _newest_prefix(os.listdir(folder))
        if prefix is None:
            raise UserError(f"{file} is not a readable checkpoint: it is an archive without ckpt*.index in it")
        try:
            # The arrays are maps of the files and outlive their names.
            return read_variables(os.path.join(folder, prefix))
        except UserError as error:
            raise UserError(f"{file}: {str(error).replace(folder + os.sep, '')}") from error


def _newest_prefix(files: Iterable[str]) -> str | None:
    """Picks the TensorFlow checkpoint "ckpt-N" of the highest N; None if there is none."""
    prefixes = [name.removesuffix(".index") for name in files if name.endswith(".index")]
    return max(prefixes, key=lambda name: int((re.findall(r"\d+$", name) or [-1])[0]), default=None)
