"""What a checkpoint tells of its model, config and classes, so that the file alone is enough to use it."""

from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ..data.datasets import coco_panoptic
from ..errors import UserError
from ..option_rules import RULES
from ..options import default_config, merge_pairs, option_values, require
from .formats import read_entries

ENTRY = "kmax_d2"  # of the checkpoint
# Of the machine, not of the model.
_LOCAL = ("MODEL.DEVICE", "MODEL.WEIGHTS", "MODEL.KMAX.TEST.SAVE_PREDICTIONS", "MODEL.KMAX.TIMM.PRETRAINED")


def describe_model(cfg: CfgNode) -> dict[str, Any]:
    """Returns the checkpoint entry of a model: its options as YAML, and its categories as in a COCO panoptic JSON."""
    cfg = cfg.clone()
    cfg.defrost()
    defaults = dict(option_values(default_config()))
    require(merge_pairs(cfg, [part for name in _LOCAL for part in (name, defaults[name])]))
    options = "".join(CfgNode({name: cfg[name]}).dump() for name in ("INPUT", "MODEL"))
    names = [*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN]
    categories = coco_panoptic.categories_of(MetadataCatalog.get(names[0])) if names else []
    return {ENTRY: {"options": options, "categories": categories}}


def merge_checkpoint(cfg: CfgNode, file: str) -> None:
    """Merges the options of a checkpoint's model in place: MODEL.WEIGHTS is the file, DATASETS.TEST names its classes.

    Raises UserError where the file cannot be read, or does not tell.
    """
    entry = read_entries(file).get(ENTRY)
    if not entry:
        raise UserError(f"{file} has weights, but not their config: name the config, and {file} as its weights")
    known = RULES.keys() | dict(option_values(cfg))
    saved = option_values(CfgNode(yaml.safe_load(entry["options"])))
    # Another version of Detectron2 has options of its own, which nothing here reads.
    require(merge_pairs(cfg, [part for pair in saved if pair[0] in known for part in pair]))
    cfg.MODEL.WEIGHTS = file
    cfg.INPUT.MIN_SIZE_TEST = cfg.INPUT.MAX_SIZE_TEST = -1  # computed again: further options may change the crop
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    if entry["categories"]:
        name = f"classes of {file}"
        coco_panoptic.register_records(name, lambda: [], **coco_panoptic.metadata_of(entry["categories"]))
        cfg.DATASETS.TEST = (name,)
