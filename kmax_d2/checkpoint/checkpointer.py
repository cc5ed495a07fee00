"""Detectron2's checkpointer, extended to read every published format and to reject another model's weights."""

import logging
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from torch import distributed as dist
from torch import nn
from torch.utils._pytree import tree_leaves

from ..errors import UserError
from ..files import whole_file, write_text
from .class_rows import OF_CLASSES, class_names, take_rows
from .formats import read_checkpoint
from .origin import ENTRY

logger = logging.getLogger(__name__)
# Inference does not read these, so that they may be missing.
TRAINING_ONLY = ("semantic_head.", "criterion.")
LAST = "last_checkpoint"  # the file that names the newest checkpoint
_OF_TRAINING = re.compile(r"model_(\d+|final)\.pth")


class KMaXCheckpointer(DetectionCheckpointer):
    """Loads every format that :func:`~kmax_d2.checkpoint.formats.read_checkpoint` knows; saves Detectron2's.

    A file is complete or absent at any time. A damaged checkpoint is passed over for an earlier one.

    Args:
        model, save_dir, checkpointables: as for :class:`~detectron2.checkpoint.DetectionCheckpointer`.
        keep: how many of the checkpoints that are saved regularly to keep, the newest; 0 keeps all.
        origin: an entry that tells where the weights come from, of :func:`~kmax_d2.checkpoint.origin.describe_model`.
        complete: whether the file must have every weight that inference reads. Otherwise a part, such as a pre-trained
            backbone, is enough, and class heads take over the classes that `origin` has too. What is resumed is always
            complete.

    Attributes:
        taken: the names of the weights that the last call of :meth:`load` loaded.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        keep: int = 0,
        origin: dict | None = None,
        complete: bool = False,
        **checkpointables,
    ):
        super().__init__(model, save_dir, **checkpointables)
        self.keep = keep
        self.origin = origin or {}
        self.complete = complete
        self._resumes = False
        self.taken: set[str] = set()

    def save(self, name: str, **extra: Any) -> None:
        """Saves weights, training state, and `extra` as `name`.pth.

        Raises UserError where that fails or a weight is not finite; earlier checkpoints are then as they were.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        states = {name: each.state_dict() for name, each in self.checkpointables.items()}
        data = {"model": self.model.state_dict()} | states
        floats = [weight for weight in data["model"].values() if weight.is_floating_point()]
        if not torch.stack([weight.isfinite().all() for weight in floats]).all():
            raise UserError("the weights are no longer finite, so they were not saved; the last checkpoint is kept")
        file = Path(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {file}")
        with whole_file(file) as unfinished:
            try:
                with open(unfinished, "wb") as stream:
                    torch.save(data | self.origin | extra, stream)
            except (OSError, RuntimeError) as error:  # PyTorch turns the one into the other
                reason = error.__context__ if isinstance(error.__context__, OSError) else error
                size = sum(leaf.nbytes for leaf in tree_leaves(data) if isinstance(leaf, torch.Tensor))
                raise OSError(f"{getattr(reason, 'strerror', reason)}; it needs {size / 1e3:.0f} kB") from error
        if _OF_TRAINING.fullmatch(file.name):  # not the best, which lacks the training state
            write_text(Path(self.save_dir, LAST), file.name)
        if self.keep:
            for old in sorted(file.parent.glob("model_[0-9]*[0-9].pth"))[: -self.keep]:
                old.unlink()

    def has_checkpoint(self) -> bool:
        """Tells whether there is a checkpoint to resume."""
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """Returns the path of the :func:`newest_checkpoint`, or an empty string."""
        return newest_checkpoint(self.save_dir)

    def load(self, path: str, checkpointables: Sequence[str] | None = None) -> dict:
        """Loads the weights at `path` and the training state of `checkpointables` (None for all); returns the rest.

        Raises UserError where the weights are missing or do not fit.
        """
        if not path:
            return super().load(path)
        wanted = list(self.checkpointables if checkpointables is None else checkpointables)
        self.logger.info(f"[{type(self).__name__}] Loading from {path} ...")
        checkpoint = self._read(path, resume=bool(wanted))
        self._resumes = any(name in checkpoint for name in wanted)
        if not self._resumes and not self.complete:
            names = checkpoint.pop("classes", None) or class_names(checkpoint.get(ENTRY))
            own_names = class_names(self.origin.get(ENTRY))
            take_rows(checkpoint["model"], names, self.model.state_dict(), own_names)
        self._log_incompatible_keys(self._load_model(checkpoint))
        for name in wanted:
            if name in checkpoint:
                try:
                    self.checkpointables[name].load_state_dict(checkpoint.pop(name))
                except UserError:
                    raise
                except Exception as error:  # of a state of any content
                    raise UserError(f"cannot resume from {path}: its {name} is damaged ({error!r})") from error
        return checkpoint

    def _read(self, path: str, resume: bool) -> dict:
        """Reads a checkpoint; as in Detectron2, processes that do not have the file get it from the main one."""
        model = self.model.module if isinstance(self.model, nn.parallel.DistributedDataParallel) else self.model
        has_file = comm.all_gather(any(map(os.path.exists, (path, f"{path}.index"))))  # of TensorFlow's checkpoints
        if not has_file[0] or all(has_file):
            return read_checkpoint(path, model, resume=resume)
        self.logger.warning(f"not all processes have {path}: they get it from the main one")
        sent: list = [None]
        if comm.is_main_process():
            try:
                sent = [read_checkpoint(path, model, resume=resume)]
            except UserError as error:  # ends all processes
                sent = [error]
        dist.broadcast_object_list(sent, group=comm._get_global_gloo_group())
        if isinstance(sent[0], UserError):
            raise sent[0]
        return sent[0]

    def _load_model(self, checkpoint: dict):
        # Published files may lack the counts of batches, which nothing reads.
        own = {name for name in self.model.state_dict() if not name.endswith("num_batches_tracked")}
        result = super()._load_model(checkpoint)
        shapes = {name: (got, want) for name, got, want in result.incorrect_shapes}
        absent = own & (shapes.keys() | set(result.missing_keys))
        self.taken = own - absent
        if not self.taken:
            raise UserError("the checkpoint is for another model: none of its weights fit")
        of_classes = {
            name for name, (got, want) in shapes.items() if OF_CLASSES.fullmatch(name) and got[1:] == want[1:]
        }
        if self._resumes:
            wrong = absent
        elif self.complete:
            wrong = {name for name in absent if not name.startswith(TRAINING_ONLY)}
        else:
            wrong = shapes.keys() - of_classes
        backbone_only = all(name.startswith("backbone.") for name in self.taken)
        if self.complete and backbone_only:
            raise UserError("the checkpoint holds only a backbone: set MODEL.WEIGHTS to weights of the whole model")
        if wrong:
            first = min(wrong)
            detail = "has shape {}, not {}".format(*shapes[first]) if first in shapes else "is missing"
            raise UserError(
                f"the checkpoint is for another model: {len(wrong)} of {len(own)} weights do not fit, e.g. {first} "
                f"{detail}. Was it trained with this config and dataset?"
            )
        part = ""
        if backbone_only:
            part = " of the backbone; the rest starts from scratch"
            own = {name for name in own if name.startswith("backbone.")}
        self.logger.info(f"loaded {len(self.taken)} of {len(own)} weights{part}")
        if of_classes:
            self.logger.warning(
                f"{len(of_classes)} weights start from scratch: their class heads have another number of classes"
            )
        missing = [name for name in result.missing_keys if name in own - of_classes]  # logged by Detectron2
        return result._replace(missing_keys=missing, incorrect_shapes=[])


def newest_checkpoint(folder: str) -> str:
    """Returns the path of the newest whole checkpoint of a training in a folder; an empty string if there was no save.

    Raises UserError if all are damaged.
    """
    found = [file for file in Path(folder).glob("*.pth") if _OF_TRAINING.fullmatch(file.name)]
    found.sort(key=lambda file: file.stat().st_mtime, reverse=True)
    tag = Path(folder, LAST)
    if tag.is_file():
        name = Path(tag.read_text(errors="replace").replace("\0", "").strip()).name  # in this folder only
        found.insert(0, Path(folder, name or LAST))
    for file in found:
        if zipfile.is_zipfile(file):  # not if it was cut short
            if file != found[0]:
                logger.warning(f"{found[0]} is missing or damaged: going back to {file}")
            return str(file)
    if found:
        raise UserError(f"no checkpoint in {folder} can be read, neither {found[0].name} nor an earlier one")
    return ""


def load_weights(model: nn.Module, file: str) -> None:
    """Loads all weights that inference reads. Raises UserError where the file is missing or of another model."""
    if not file:
        raise UserError("no weights: set MODEL.WEIGHTS to a checkpoint")
    with torch.no_grad():
        KMaXCheckpointer(model, complete=True).load(file)
