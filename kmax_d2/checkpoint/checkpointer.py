"""Detectron2's checkpointer, which reads every published format and says clearly when weights are another model's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import urlparse

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from ..errors import UserError
from .formats import read_checkpoint

# Of a model that is only to segment, these may be missing: they are read in training alone.
TRAINING_ONLY = ("semantic_head.", "criterion.")
# Their first axis is the classes.
_OF_CLASSES = re.compile(r"(.*\.class_head|semantic_head\.classifier)\.(weight|bias)")


class KMaXCheckpointer(DetectionCheckpointer):
    """Loads checkpoints of every format that :func:`~kmax_d2.checkpoint.formats.read_checkpoint` knows; saves
    Detectron2's.

    Args:
        model, save_dir, checkpointables: as for :class:`~detectron2.checkpoint.DetectionCheckpointer`.
        complete: whether every weight that inference reads must be in the file. Else a part, such as a pre-trained
            backbone, is enough, and class heads of another number of classes are left as they are.

    Attributes:
        taken: names of the weights that were loaded last.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", *, complete: bool = False, **checkpointables):
        super().__init__(model, save_dir, **checkpointables)
        self.complete = complete
        self.taken: set[str] = set()

    def load(self, path: str, checkpointables: Sequence[str] | None = None) -> dict:
        """Loads the weights that `path` names, and the training state of `checkpointables` (None for all).

        Returns what else the file holds. Raises UserError where the weights are missing or do not fit.
        """
        if not path:
            return super().load(path)
        wanted = list(self.checkpointables if checkpointables is None else checkpointables)
        self.logger.info(f"[{type(self).__name__}] Loading from {path} ...")
        heuristics = urlparse(path).query == "matching_heuristics=True"  # Detectron2's way to ask for them
        checkpoint = read_checkpoint(path.partition("?")[0] if heuristics else path, self.model, resume=bool(wanted))
        if heuristics:
            checkpoint["matching_heuristics"] = True
        self._log_incompatible_keys(self._load_model(checkpoint))
        for name in wanted:
            if name in checkpoint:
                self.checkpointables[name].load_state_dict(checkpoint.pop(name))
        return checkpoint

    def _load_model(self, checkpoint: dict):
        # Buffers that are made anew in every model are not weights to ask for.
        own = {name for name in self.model.state_dict() if not name.endswith("num_batches_tracked")}
        result = super()._load_model(checkpoint)
        shapes = {name: (got, want) for name, got, want in result.incorrect_shapes}
        absent = own & (shapes.keys() | set(result.missing_keys))
        self.taken = own - absent
        if not self.taken:
            raise UserError("the checkpoint holds another model: none of its weights fits")
        of_classes = {
            name for name, (got, want) in shapes.items() if _OF_CLASSES.fullmatch(name) and got[1:] == want[1:]
        }
        if self.complete:
            wrong = {name for name in absent if not name.startswith(TRAINING_ONLY)}
        else:
            wrong = shapes.keys() - of_classes
        backbone_only = all(name.startswith("backbone.") for name in self.taken)
        if self.complete and backbone_only:
            raise UserError("the checkpoint holds a backbone alone: set MODEL.WEIGHTS to weights of the whole model")
        if wrong:
            example = min(wrong)
            got, want = shapes.get(example, (None, None))
            detail = f"{example} has shape {got} for {want}" if example in shapes else f"{example} is missing"
            raise UserError(
                f"the checkpoint holds another model: {len(wrong)} of {len(own)} weights do not fit, e.g. {detail}. "
                "Is it of this config and dataset?"
            )
        part = "weights"
        if backbone_only:
            part = "weights of the backbone; the rest starts from scratch"
            own = {name for name in own if name.startswith("backbone.")}
        self.logger.info(f"took {len(self.taken)} of {len(own)} {part}")
        if of_classes:
            self.logger.warning(
                f"{len(of_classes)} weights start from scratch: their class heads are of another number of classes"
            )
        # The rest is for Detectron2 to log.
        missing = [name for name in result.missing_keys if name in own - of_classes]
        return result._replace(missing_keys=missing, incorrect_shapes=[])


def load_weights(model: nn.Module, file: str) -> None:
    """Loads all weights that inference reads. Raises UserError where the file is missing or of another model."""
    if not file:
        raise UserError("no weights: set MODEL.WEIGHTS to a checkpoint")
    with torch.no_grad():
        KMaXCheckpointer(model, complete=True).load(file)
