"""Detectron2's checkpointer, which says clearly when a file holds another model's weights."""

from __future__ import annotations

import pickle
import zipfile

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from ..errors import UserError

# Of a model that is only to segment, these may be missing: they are read in training alone.
TRAINING_ONLY = ("semantic_head.", "criterion.")


class KMaXCheckpointer(DetectionCheckpointer):
    """Loads and saves checkpoints in Detectron2's formats.

    Args:
        model, save_dir, checkpointables: as for :class:`~detectron2.checkpoint.DetectionCheckpointer`.
        complete: whether every weight that inference reads must be in the file; else a part, such as a pre-trained
            backbone, is enough.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", *, complete: bool = False, **checkpointables):
        super().__init__(model, save_dir, **checkpointables)
        self.complete = complete

    def load(self, path: str, *args, **kwargs) -> dict:
        if path and "://" not in path and not self.path_manager.isfile(path):
            raise UserError(f"no checkpoint {path}")
        return super().load(path, *args, **kwargs)

    def _load_file(self, filename: str) -> dict:
        try:
            return super()._load_file(filename)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            raise UserError(f"{filename} is no readable checkpoint: {' '.join(str(error).split())}") from error

    def _load_model(self, checkpoint: dict):
        # Buffers that are made anew in every model are not weights to ask for.
        own = {name for name in self.model.state_dict() if not name.endswith("num_batches_tracked")}
        result = super()._load_model(checkpoint)
        absent = set(result.missing_keys) | {name for name, *_ in result.incorrect_shapes}
        prefix = "module." if isinstance(self.model, nn.parallel.DistributedDataParallel) else ""
        needed = {name for name in own & absent if not name.removeprefix(prefix).startswith(TRAINING_ONLY)}
        if own <= absent:
            raise UserError("the checkpoint holds another model: none of its weights fits")
        if self.complete and needed:
            example = min(needed)
            mismatch = {name: (got, want) for name, got, want in result.incorrect_shapes}.get(example)
            detail = f"{example} has shape {mismatch[0]} for {mismatch[1]}" if mismatch else f"{example} is missing"
            raise UserError(
                f"the checkpoint holds another model: {len(needed)} of {len(own)} weights do not fit, e.g. {detail}. "
                "Is it of this config and dataset?"
            )
        return result


def load_weights(model: nn.Module, file: str) -> None:
    """Loads all weights that inference reads. Raises UserError where the file is missing or of another model."""
    if not file:
        raise UserError("no weights: set MODEL.WEIGHTS to a checkpoint")
    with torch.no_grad():
        KMaXCheckpointer(model, complete=True).load(file)
