"""Renaming by an ordered list of regular expressions, which all converters of foreign weights share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

Rule = tuple[str, str | Callable[[re.Match], str]]  # a pattern and its replacement, as re.sub takes them


def rename(name: str, rules: Iterable[Rule]) -> str:
    """Applies every rule in order, each to the result of those before it."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
