"""Detectron2's checkpointer, extended to read every published format and to reject another model's weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import urlparse

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from ..errors import UserError
from .formats import read_checkpoint

# Inference does not read these, so that they may be missing.
TRAINING_ONLY = ("semantic_head.", "criterion.")
# Their first axis is the classes.
_OF_CLASSES = re.compile(r"(.*\.class_head|semantic_head\.classifier)\.(weight|bias)")


class KMaXCheckpointer(DetectionCheckpointer):
    """Loads every format that :func:`~kmax_d2.checkpoint.formats.read_checkpoint` knows; saves Detectron2's.

    Args:
        model, save_dir, checkpointables: as for :class:`~detectron2.checkpoint.DetectionCheckpointer`.
        complete: whether the file must have every weight that inference reads. Otherwise a part, such as a pre-trained
            backbone, is enough, and class heads for another number of classes keep their initial values.

    Attributes:
        taken: the names of the weights that the last call of :meth:`load` loaded.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", *, complete: bool = False, **checkpointables):
        super().__init__(model, save_dir, **checkpointables)
        self.complete = complete
        self.taken: set[str] = set()

    def load(self, path: str, checkpointables: Sequence[str] | None = None) -> dict:
        """Loads the weights at `path` and the training state of `checkpointables` (None for all); returns the rest.

        Raises UserError where the weights are missing or do not fit.
        """
        if not path:
            return super().load(path)
        wanted = list(self.checkpointables if checkpointables is None else checkpointables)
        self.logger.info(f"[{type(self).__name__}] Loading from {path} ...")
        heuristics = urlparse(path).query == "matching_heuristics=True"  # how Detectron2 asks for them
        checkpoint = read_checkpoint(path.partition("?")[0] if heuristics else path, self.model, resume=bool(wanted))
        if heuristics:
            checkpoint["matching_heuristics"] = True
        self._log_incompatible_keys(self._load_model(checkpoint))
        for name in wanted:
            if name in checkpoint:
                self.checkpointables[name].load_state_dict(checkpoint.pop(name))
        return checkpoint

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
            name for name, (got, want) in shapes.items() if _OF_CLASSES.fullmatch(name) and got[1:] == want[1:]
        }
        if self.complete:
            wrong = {name for name in absent if not name.startswith(TRAINING_ONLY)}
        else:
            wrong = shapes.keys() - of_classes
        backbone_only = all(name.startswith("backbone.") for name in self.taken)
        if self.complete and backbone_only:
            raise UserError("the checkpoint holds only a backbone: set MODEL.WEIGHTS to weights of the whole model")
        if wrong:
            detail = f"{min(wrong)} is missing"
            if min(wrong) in shapes:
                detail = "{} has shape {}, not {}".format(min(wrong), *shapes[min(wrong)])
            raise UserError(
                f"the checkpoint is for another model: {len(wrong)} of {len(own)} weights do not fit, e.g. {detail}. "
                "Was it trained with this config and dataset?"
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
        # Detectron2 logs the rest.
        missing = [name for name in result.missing_keys if name in own - of_classes]
        return result._replace(missing_keys=missing, incorrect_shapes=[])


def load_weights(model: nn.Module, file: str) -> None:
    """Loads all weights that inference reads. Raises UserError where the file is missing or of another model."""
    if not file:
        raise UserError("no weights: set MODEL.WEIGHTS to a checkpoint")
    with torch.no_grad():
        KMaXCheckpointer(model, complete=True).load(file)
