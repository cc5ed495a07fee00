"""From a config to the arguments and parts of a model."""

import logging
import re
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.utils.logger import log_first_n
from detectron2.utils.registry import Registry
from torch import nn

from ..data.datasets import register_shared
from ..errors import UserError, did_you_mean


def keyword_arguments(options: CfgNode) -> dict[str, object]:
    """Turns a group of options but for its NAME into keyword arguments: `NUM_HEADS` becomes `num_heads`."""
    return {name.lower(): value for name, value in options.items() if name != "NAME"}


def find_part(registry: Registry, option: str, name: str) -> Any:
    """Returns what is registered with this name. Raises UserError that names the option if nothing is."""
    if name not in registry:
        known = sorted(registered for registered, _ in registry)
        raise UserError(f"{option} is {name}, but there are {', '.join(known)}{did_you_mean(name, known)}")
    return registry.get(name)


def build_from(registry: Registry, option: str, name: str, *args: object, **kwargs: object) -> nn.Module:
    """Calls the registered part with this name; raises UserError as :func:`find_part` does."""
    return find_part(registry, option, name)(*args, **kwargs)


def find_map(name: str, shapes: Mapping[str, ShapeSpec]) -> str:
    """Returns the name of a backbone's map: `name`, or where the backbone's names differ, its last map of that stride.

    The names of kMaX-DeepLab say the stride: "stage5" has stride 2^5. Raises UserError if there is no such map.
    """
    stage = re.fullmatch(r"stage(\d)", name)
    at_stride = [key for key, shape in shapes.items() if stage and shape.stride == 2 ** int(stage[1])]
    if name in shapes or at_stride:
        return name if name in shapes else at_stride[-1]
    maps = ", ".join(f"{key} (stride {shape.stride})" for key, shape in shapes.items())
    wanted = f"{name}, of stride {2 ** int(stage[1])}" if stage else name
    raise UserError(
        f"the backbone has no map {wanted}, but {maps}: change MODEL.KMAX.PIXEL_DECODER.IN_FEATURES, or the backbone's "
        "own option, such as MODEL.RESNETS.OUT_FEATURES or MODEL.FPN.IN_FEATURES"
    )


def thing_mask(cfg: CfgNode) -> list[bool]:
    """For each contiguous class of the config's datasets whether it is a thing. Without a dataset, none is: it warns.

    Raises:
        UserError: a dataset has not been registered, or has no panoptic classes.
    """
    register_shared()
    names = [*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN]
    if not names:
        text = "no dataset says which classes are things, so all are stuff: name one in DATASETS.TEST"
        log_first_n(logging.WARNING, text, name=__name__)
    things = [MetadataCatalog.get(name).get("thing_dataset_id_to_contiguous_id") for name in names]
    for name, ids in zip(names, things, strict=True):
        if ids is None:
            known = DatasetCatalog.list()
            hint = "" if name in known else did_you_mean(name, known)
            raise UserError(f"no dataset {name} with panoptic classes is registered{hint}")
    contiguous = set(things[0].values()) if things else set()
    return [index in contiguous for index in range(cfg.MODEL.KMAX.NUM_CLASSES)]
