"""What makes a built model faster (temporary: replaced on merge)."""

from __future__ import annotations

import importlib

_HOMES = {
    "COMPILE_MODES": ("modeling.compile", "MODES"),
    "PRECISIONS": ("engine.precision", "PRECISIONS"),
    "compile_model": ("modeling.compile", "compile_model"),
    "fold_batch_norms": ("modeling.fold", "fold_batch_norms"),
    "inference_model": ("engine.inference", "inference_model"),
    "require_precision": ("engine.precision", "require_precision"),
    "use_precision": ("engine.precision", "use_precision"),
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(name)
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(f"kmax_d2.{module}"), attribute)


def keep_freed_memory() -> None:
    """Keeps freed memory; does nothing yet."""
