"""Fine-tuning with other classes: the rows of class heads go to the classes of the same names."""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.data import Metadata, MetadataCatalog

from ..data.datasets import register_shared

logger = logging.getLogger(__name__)
# The first axis of these is the classes, which may be followed by void.
OF_CLASSES = re.compile(r"(.*\.class_head|semantic_head\.classifier)\.(weight|bias)")
# The datasets of published weights, by the number of their classes.
_PUBLISHED = {133: "coco_2017_val_panoptic", 19: "cityscapes_fine_panoptic_val", 150: "ade20k_panoptic_val"}
_SUFFIX = re.compile(r"(-other)?(-merged|-stuff)?$")  # of COCO's stuff, such as "sky-other-merged"
SHOWN = 5  # names in the log


def published_metadata(count: int) -> Metadata | None:
    """Returns the metadata of the dataset whose published weights have `count` classes, without void."""
    register_shared()
    return MetadataCatalog.get(_PUBLISHED[count]) if count in _PUBLISHED else None


def class_names(entry: Any) -> list[str]:
    """Returns the class names in a checkpoint's description of its model; none if it is damaged."""
    try:
        names = [category["name"] for category in entry["categories"]]
    except (KeyError, TypeError, IndexError):
        return []
    return names if all(isinstance(name, str) for name in names) else []


def take_rows(
    weights: dict[str, torch.Tensor], names: Sequence[str], own: Mapping[str, torch.Tensor], own_names: Sequence[str]
) -> None:
    """Replaces a checkpoint's class heads by the model's, with the checkpoint's rows for classes of equal names.

    The other classes keep the model's rows; void has the checkpoint's if any class has. Equal names come first; others
    are compared without case, synonyms after a comma, and COCO's endings such as "-merged". Logs one line unless the
    classes are the same.

    Args:
        weights: the checkpoint's, by our names; changed in place.
        names: the checkpoint's classes; without any, nothing is changed.
        own, own_names: weights and classes of the model; without classes, nothing is changed.
    """
    heads = [name for name in weights if OF_CLASSES.fullmatch(name) and name in own]
    if heads and own_names and not names:
        logger.info("the checkpoint does not name its classes: class heads of the same size are taken as they are")
    if not heads or not names or not own_names or list(names) == list(own_names):
        return
    rows = {_plain(name): index for index, name in enumerate(names)} | {name: index for index, name in enumerate(names)}
    sources = [rows.get(name, rows.get(_plain(name))) for name in own_names]
    pairs = [(source, index) for index, source in enumerate(sources) if source is not None]
    for head in heads:
        old, new = weights[head], own[head].detach().clone()
        if not old.ndim or old.shape[1:] != new.shape[1:] or len(old) < len(names):
            continue  # which is reported as another model
        both_void = len(old) > len(names) and len(new) > len(own_names)
        for source, target in [*pairs, (len(names), len(own_names))] if pairs and both_void else pairs:
            new[target] = old[source].to(new)
        weights[head] = new
    shown = ", ".join(own_names[target] for _, target in pairs[:SHOWN]) + ", …" * (len(pairs) > SHOWN)
    logger.info(
        f"the class heads take over {len(pairs)} of {len(own_names)} classes{' (' * bool(pairs)}{shown}"
        f"{')' * bool(pairs)}; the others start from scratch"
    )


def _plain(name: str) -> str:
    return _SUFFIX.sub("", name.partition(",")[0].strip().lower())
