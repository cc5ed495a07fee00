"""Reads configs and checks that every option exists and has a valid value."""

import json
import logging
from ast import literal_eval
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY

from .config import add_kmax_config
from .errors import UserError, did_you_mean
from .option_rules import RULES, check_relations

logger = logging.getLogger(__name__)
_KINDS = {bool: "True or False", str: "a text", CfgNode: "a section of options"}


def default_config() -> CfgNode:
    """Returns Detectron2's and this project's options with their defaults."""
    cfg = get_cfg()
    add_kmax_config(cfg)
    return cfg


def option_values(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the full name and the value of each option."""
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from option_values(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def require(faults: Sequence[str]) -> None:
    """Raises UserError that names all faults of a config, if there are any."""
    if len(faults) > 1:
        raise UserError(f"{len(faults)} faults: {'; '.join(faults)}")
    if faults:
        raise UserError(faults[0])


def merge_file(cfg: CfgNode, file: Path, above: tuple[Path, ...] = ()) -> list[str]:
    """Merges a config file after the files in its _BASE_, in place; `above` are the files that lead to it.

    Returns the faults of :func:`merge`. Raises UserError for a file that is unreadable, not a mapping, or its own base.
    """
    if file.resolve() in above:
        raise UserError(f"the config {file} includes itself through _BASE_")
    try:
        options = yaml.safe_load(file.read_text(encoding="utf-8"))  # unlike Detectron2's way, this runs no code
    except OSError as error:
        raise UserError(f"cannot read the config {file}: {error.strerror}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(options, dict):
        raise UserError(f"the config {file} must contain options, such as SEED: 1")
    bases, faults = options.pop("_BASE_", []), []
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str):
            raise UserError(f"_BASE_ in {file} is {base}, but must be a config file")
        faults += merge_file(cfg, file.parent / Path(base).expanduser(), (*above, file.resolve()))
    return faults + merge(cfg, options)


def merge(cfg: CfgNode, options: Mapping, prefix: str = "") -> list[str]:
    """Merges nested options in place; texts may be Python literals, as on a command line.

    Returns the faults: options that do not exist, and values of another type than the default's.
    """
    faults: list[str] = []
    for key, value in options.items():
        name = f"{prefix}{key}"
        if not isinstance(cfg, CfgNode) or key not in cfg:
            faults.append(f"no option {name}{did_you_mean(name, dict(option_values(default_config())))}")
            continue
        old = cfg[key]
        if isinstance(value, Mapping) and value:
            faults += merge(old, value, f"{name}.")
            continue
        value = _convert(value, old)
        if type(value) is not type(old) and old is not None:
            wanted = getattr(RULES.get(name), "wanted", "") or _KINDS.get(type(old), "a list")
            faults.append(f"{name} is {value or repr(value)}, but must be {wanted}")
        else:
            cfg[key] = value
    return faults


def merge_pairs(cfg: CfgNode, pairs: Sequence) -> list[str]:
    """Merges (name, value, name, value, ...) in place; returns the faults of :func:`merge`, or that of a lone name."""
    if len(pairs) % 2:
        return [f"options must be NAME VALUE pairs; {pairs[-1]} has no value"]
    faults = []
    for name, value in zip(pairs[::2], pairs[1::2], strict=True):
        nested = value
        for part in reversed(str(name).split(".")):
            nested = {part: nested}
        faults += merge(cfg, nested)
    return faults


def _convert(value: Any, old: Any) -> Any:
    """Returns a value as the type of the old one where it is written as another, such as 1 for 1.0."""
    if isinstance(value, str):
        try:
            literal = literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            literal = value
        value = literal if isinstance(literal, str) or not isinstance(old, str) else value
    if type(value) in (list, tuple) and type(old) in (list, tuple):
        return type(old)(value)
    return float(value) if type(value) is int and type(old) is float else value


def check(cfg: CfgNode, faults: Sequence[str] = ()) -> None:
    """Raises UserError that names these faults and all unfit values, or options that contradict each other."""
    found = list(faults)
    for name, value in option_values(cfg):
        rule = RULES.get(name)
        if rule and not rule.holds(value):
            hint = did_you_mean(str(value), rule.choices)
            found.append(f"{name} is {value or repr(value)}, but must be {rule.wanted}{hint}")
    require(found)
    check_relations(cfg)


def warn_of_unused(cfg: CfgNode) -> None:
    """Warns of Detectron2's options that are changed although nothing in this project reads them."""
    defaults = dict(option_values(default_config()))
    unused = [
        name
        for name, value in option_values(cfg)
        if name in defaults and name not in RULES and not _same(value, defaults[name])
    ]
    if _has_foreign_parts(cfg):
        unused = [name for name in unused if not name.startswith("MODEL.")]
    if unused:
        logger.warning(f"kmax_d2 itself does not read {', '.join(unused)}: only your own code can")


def _same(one: Any, other: Any) -> bool:
    """Compares values; a dumped config has lists for the tuples inside of others."""
    return json.dumps(one, default=str) == json.dumps(other, default=str)


def _has_foreign_parts(cfg: CfgNode) -> bool:
    """Returns whether model or backbone are from elsewhere, and may read any option of the model."""
    parts = ((META_ARCH_REGISTRY, cfg.MODEL.META_ARCHITECTURE), (BACKBONE_REGISTRY, cfg.MODEL.BACKBONE.NAME))
    found = [registry.get(name) for registry, name in parts if name in registry]
    return any(not str(part.__module__).startswith("kmax_d2.") for part in found)


def set_test_size(cfg: CfgNode) -> None:
    """Sets the sizes with which Detectron2's DefaultPredictor resizes as the test mapper does, in place.

    They fit a crop of two different sides only to images of the same orientation. Raises UserError for other sizes.
    """
    sizes = sorted(cfg.INPUT.CROP_SIZE) if cfg.INPUT.FIT_CROP else (0, 0)
    for name, size in zip(("MIN_SIZE_TEST", "MAX_SIZE_TEST"), sizes, strict=True):
        if cfg.INPUT[name] not in (-1, size):
            raise UserError(
                f"INPUT.{name} follows from INPUT.CROP_SIZE and FIT_CROP: leave it out, or set it to {size}"
            )
        cfg.INPUT[name] = size
