"""From a config to the arguments and parts of a model."""

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.registry import Registry
from torch import nn

from ..errors import UserError, did_you_mean


def keyword_arguments(options: CfgNode) -> dict[str, object]:
    """Turns a group of options but for its NAME into keyword arguments: `NUM_HEADS` becomes `num_heads`."""
    return {name.lower(): value for name, value in options.items() if name != "NAME"}


def build_from(registry: Registry, option: str, name: str, *args: object, **kwargs: object) -> nn.Module:
    """Calls the registered part with this name. Raises UserError that names the option if there is none."""
    if name not in registry:
        known = sorted(registered for registered, _ in registry)
        raise UserError(f"{option} is {name}, but there are {', '.join(known)}{did_you_mean(name, known)}")
    return registry.get(name)(*args, **kwargs)


def thing_mask(cfg: CfgNode) -> list[bool]:
    """For each contiguous class of the config's datasets whether it is a thing. Without a dataset, no class is.

    Raises:
        UserError: a dataset has not been registered, or has no panoptic classes.
    """
    names = [*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN]
    things = [MetadataCatalog.get(name).get("thing_dataset_id_to_contiguous_id") for name in names]
    for name, ids in zip(names, things, strict=True):
        if ids is None:
            known = DatasetCatalog.list()
            hint = "" if name in known else did_you_mean(name, known)
            raise UserError(f"no dataset {name} with panoptic classes is registered{hint}")
    contiguous = set(things[0].values()) if things else set()
    return [index in contiguous for index in range(cfg.MODEL.KMAX.NUM_CLASSES)]
