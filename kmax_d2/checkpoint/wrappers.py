"""Finds the weights in what training programs save: in dicts of dicts, and under names with prefixes."""

import re
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch

from ..errors import UserError

_DEPTH = 4  # of the dicts, which may contain themselves
_WORD = "model|module|state|dict|net|network|weights|params|ema|averaged"
_HOLDER = re.compile(rf"_?({_WORD})(_({_WORD}))*")  # such as "model_state_dict"
_PREFIX = re.compile(rf"((_orig_mod|{_HOLDER.pattern})\.)+")


def find_weights(content: object, file: str) -> tuple[str, dict]:
    """Returns where the only set of weights in a file's content is, such as "state_dict", and the set by name.

    Raises UserError if there are several or none, or an entry is not a tensor with numbers.
    """
    sets = list(_sets(content))
    if len(sets) > 1:
        raise UserError(_choice(file, [place for place, _ in sets], f"torch.load({file!r})[NAME]"))
    if not sets or not all(isinstance(name, str) for name in sets[0][1]):
        raise UserError(f"{file} is not a readable checkpoint: it does not hold weights by name")
    for name, value in sets[0][1].items():
        if kind := _unfit(value):
            raise UserError(f"{file} is not a readable checkpoint: its weights {name[:200]} are {kind}")
    return sets[0]


def _sets(content: object, *place: str) -> Iterator[tuple[str, dict]]:
    """Yields the places and the contents of the innermost dicts that have tensors in them."""
    entries = dict(dict.items(content)) if isinstance(content, dict) else {}  # whatever a file gave as its methods
    inner: list[tuple[str, dict]] = []
    for name, value in entries.items():
        if len(place) < _DEPTH and isinstance(name, str) and isinstance(value, dict) and _HOLDER.fullmatch(name):
            inner += _sets(value, *place, name)
    if inner:
        yield from inner
    elif any(isinstance(value, torch.Tensor | np.ndarray) for value in entries.values()):
        yield ".".join(place), entries


def _unfit(value: Any) -> str:
    """Names what weights are in place of an ordinary tensor of numbers; an empty string if they are one."""
    if isinstance(value, np.ndarray):
        return "" if value.dtype.kind in "biuf" and value.dtype.itemsize <= 8 else f"an array of {value.dtype}"
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    kinds = {"without values": value.is_meta, "sparse": value.layout != torch.strided or value.is_nested}
    kinds |= {"quantized": value.is_quantized, "complex": value.is_complex()}
    return next((f"{kind} in place of a plain tensor" for kind, holds in kinds.items() if holds), "")


def strip_prefix(weights: dict[str, Any], names: Collection[str], file: str) -> tuple[str, dict[str, Any]]:
    """Returns the prefix of the model's weights in a file, such as "module.", and the weights without it.

    Args:
        weights: the file's; those without a prefix, such as a criterion's beside the model, are left out.
        names: the model's; if they have such prefixes themselves, nothing is changed.
        file: for the error.

    Raises UserError if there are several prefixes, as of raw and averaged weights.
    """
    if any(_PREFIX.match(name) for name in names):
        return "", weights
    weights = {name.replace("._orig_mod.", "."): value for name, value in weights.items()}
    prefixes = {match[0] for name in weights if (match := _PREFIX.match(name))}
    if len(prefixes) > 1:
        raise UserError(_choice(file, sorted(prefixes), "the entries of one prefix"))
    prefix = "".join(prefixes)
    return prefix, {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def _choice(file: str, places: list[str], content: str) -> str:
    sets = f"{len(places)} sets of weights, {', '.join(places)}"
    return f"{file} holds {sets}: choose one and save it alone, torch.save({content}, NEW)"
