"""Weights of any published format, told apart by what the file holds and not by its name."""

from __future__ import annotations

import lzma
import os
import pickle
import re
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..errors import UserError
from .download import download, is_address
from .imagenet import imagenet_to_state_dict, is_imagenet, load_timm
from .official import official_to_state_dict
from .port import check_port_options, is_port, port_to_state_dict
from .tensor_bundle import TensorBundle

TIMM = "timm://"
_BUNDLE_FILE = re.compile(r"(.*)\.(?:index|data-\d+-of-\d+)")
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # what torch.save began with before it wrote zip archives


def read_checkpoint(path: str, model: nn.Module, *, resume: bool = False) -> dict:
    """Reads what MODEL.WEIGHTS names.

    Args:
        path: a file, an address, the prefix of a TensorFlow checkpoint such as ".../ckpt-150000", or "timm://NAME".
        model: a :class:`~kmax_d2.modeling.KMaXDeepLab` that the weights are for; it gives the order of the classes.
        resume: whether the training state is wanted too. Without it the tensors may be views of the file.

    Returns:
        "model": a state dict in our names; for a checkpoint of our own also what else it holds, such as "trainer".

    Raises:
        UserError: the file is missing, damaged or no checkpoint, or its weights ask for other options of the model.
    """
    if path.startswith(TIMM):
        return {"model": load_timm(path.removeprefix(TIMM))}
    file = download(path) if is_address(path) else PathManager.get_local_path(path)
    try:
        checkpoint = _read(file, resume)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error
    except UserError as error:
        if not is_address(path):
            raise
        Path(file).unlink(missing_ok=True)
        raise UserError(f"{path} gave no checkpoint: {error}. It is removed; run again to download it again") from error
    return _in_our_names(checkpoint, model)


def _in_our_names(checkpoint: dict, model: nn.Module) -> dict:
    weights = checkpoint["model"]
    if any("/" in name for name in weights):
        return {"model": official_to_state_dict(weights, model.merging.is_thing.tolist())}
    weights = {name: torch.as_tensor(value) for name, value in weights.items()}
    if is_port(weights):
        check_port_options(model)
        return {"model": port_to_state_dict(weights)}
    if is_imagenet(weights):
        return {"model": imagenet_to_state_dict(weights)}
    return checkpoint | {"model": weights}


def _read(file: str, resume: bool) -> dict:
    """Reads by content: a dict with "model" and, of a checkpoint of our own, whatever else it holds."""
    bundle = _BUNDLE_FILE.fullmatch(file)
    prefix = bundle[1] if bundle else file
    if os.path.isfile(f"{prefix}.index"):
        return {"model": dict(TensorBundle(prefix).variables())}
    if os.path.isdir(file):
        prefix = _newest_prefix(os.listdir(file))
        hint = f" - did you mean {os.path.join(file, prefix)}?" if prefix else ""
        raise UserError(f"{file} is no readable checkpoint: it is a folder{hint}")
    if not os.path.isfile(file):
        raise UserError(f"no checkpoint {file}")
    with open(file, "rb") as stream:
        head = stream.read(512)
    if head and tarfile.is_tarfile(file):
        return {"model": _read_archive(file)}
    is_zip = head.startswith(b"PK\x03\x04")
    if is_zip or head.startswith(_LEGACY_TORCH):
        loaded = _read_torch(file, is_zip, resume)
    elif head.startswith(b"\x80"):
        loaded = _read_pickle(file)
    elif head[8:9] == b"{":  # safetensors: the length of its header, then the header in JSON
        try:
            loaded = load_file(file)
        except SafetensorError as error:
            raise _damaged(file, error) from error
    else:
        raise UserError(f"{file} is no readable checkpoint: it is {_kind(head)}")
    checkpoint = loaded if isinstance(loaded, dict) and "model" in loaded else {"model": loaded}
    weights = checkpoint["model"]
    if not isinstance(weights, Mapping) or not all(isinstance(w, torch.Tensor | np.ndarray) for w in weights.values()):
        raise UserError(f"{file} is no readable checkpoint: it holds other things than weights by name")
    return checkpoint


def _kind(head: bytes) -> str:
    """Names what begins with `head`, of the things that are often found in place of a checkpoint."""
    if not head:
        return "empty"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page"
    if head.startswith(b"\x1f\x8b"):
        return "a gzip file without an archive in it"
    control = set(range(32)) - set(b"\t\n\r\f")
    return "a file of unknown format" if control & set(head) else "a text file"


def _damaged(file: str, error: Exception) -> UserError:
    return UserError(f"{file} is no readable checkpoint: it is damaged or cut short ({' '.join(str(error).split())})")


def _read_torch(file: str, is_zip: bool, resume: bool) -> object:
    """What torch.save wrote."""
    if is_zip:
        try:
            with zipfile.ZipFile(file) as archive:
                names = archive.namelist()
        except zipfile.BadZipFile as error:
            raise _damaged(file, error) from error
        if not any(name.endswith("/data.pkl") for name in names):
            raise UserError(f"{file} is no readable checkpoint: it is a zip archive not written by torch.save")
    try:
        # A training state lives on, and must not be a view of a file that the run may overwrite.
        return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip and not resume)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found is None:
            raise _damaged(file, error) from error
        raise UserError(f"{file} is not read: besides tensors it holds {found[1]}, which could run code") from error
    except (RuntimeError, ValueError, KeyError, EOFError) as error:
        raise _damaged(file, error) from error


def _read_pickle(file: str) -> object:
    """What Detectron2's .pkl files hold: {"model": arrays by name, "__author__": ...}, or Caffe2's arrays by name."""
    with open(file, "rb") as stream:
        try:
            loaded = pickle.load(stream, encoding="latin1")
        except Exception as error:  # damaged bytes are instructions, which can fail in any way
            raise _damaged(file, error) from error
    if not isinstance(loaded, dict) or "model" in loaded:
        return loaded
    arrays = loaded.get("blobs", loaded)
    return {name: array for name, array in arrays.items() if not name.endswith("_momentum")}


def _read_archive(file: str) -> dict[str, np.ndarray]:
    """The variables of the newest TensorFlow checkpoint in a tar archive."""
    with tempfile.TemporaryDirectory(prefix="kmax_d2_") as folder:
        try:
            with tarfile.open(file, "r|*") as archive:  # a stream: seeking would unpack from the beginning again
                for member in archive:
                    name = PurePosixPath(member.name).name
                    if not member.isfile() or not name.startswith("ckpt") or not _BUNDLE_FILE.fullmatch(name):
                        continue
                    if name in os.listdir(folder):
                        raise UserError(f"{file} holds {name} twice")
                    with open(os.path.join(folder, name), "wb") as out:
                        shutil.copyfileobj(archive.extractfile(member), out)
        except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise _damaged(file, error) from error
        prefix = _newest_prefix(os.listdir(folder))
        if prefix is None:
            raise UserError(f"{file} is no readable checkpoint: it is an archive without ckpt*.index in it")
        try:
            # The arrays are maps of the files, and stay when these are removed.
            return dict(TensorBundle(os.path.join(folder, prefix)).variables())
        except UserError as error:
            raise UserError(f"{file}: {str(error).replace(folder + os.sep, '')}") from error


def _newest_prefix(files: Iterable[str]) -> str | None:
    """Of TensorFlow checkpoints "ckpt-N" the one of the highest N; None where `files` has none."""
    prefixes = [name.removesuffix(".index") for name in files if name.endswith(".index")]
    return max(prefixes, key=lambda name: int((re.findall(r"\d+$", name) or [-1])[0]), default=None)
