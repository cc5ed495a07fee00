"""What makes a built model faster (temporary: replaced on merge)."""

from __future__ import annotations

from ..engine.inference import inference_model
from ..engine.precision import PRECISIONS, require_precision, use_precision
from ..modeling.compile import MODES as COMPILE_MODES
from ..modeling.compile import compile_model
from ..modeling.fold import fold_batch_norms


def keep_freed_memory() -> None:
    """Keeps freed memory; does nothing yet."""


__all__ = [
    "COMPILE_MODES",
    "PRECISIONS",
    "compile_model",
    "fold_batch_norms",
    "inference_model",
    "keep_freed_memory",
    "require_precision",
    "use_precision",
]
