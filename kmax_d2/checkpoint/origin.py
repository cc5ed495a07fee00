"""What a checkpoint tells of its model, config and classes, so that the file alone is enough to use it."""

import logging
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ..data.datasets import coco_panoptic
from ..errors import UserError
from ..option_rules import RULES
from ..options import default_config, merge_pairs, option_values, require
from .formats import read_entries

logger = logging.getLogger(__name__)
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
    if not isinstance(entry, dict):
        raise UserError(f"{file} has weights, but not their config: name the config, and {file} as its weights")
    try:
        _merge_entry(cfg, file, entry["options"], entry["categories"])
    except Exception as error:  # of an entry of any content
        reason = error if isinstance(error, UserError) else " ".join(f"{type(error).__name__}: {error}"[:200].split())
        raise UserError(
            f"{file} has a damaged description of its model ({reason}): name the config, and {file} as its weights"
        ) from error


def _merge_entry(cfg: CfgNode, file: str, options: str, categories: list[dict]) -> None:
    known = RULES.keys() | dict(option_values(cfg))
    known |= {name.rpartition(".")[0] for name in known}  # sections, in place of which a damaged file may have a value
    saved = dict(option_values(CfgNode(yaml.safe_load(options))))
    if "MODEL.KMAX.NUM_CLASSES" not in saved:
        raise UserError("its options are not those of a model")
    _, faults = coco_panoptic.find_categories({"categories": categories}, file)
    require([fault.line for fault in faults[:1]])
    # Another version of Detectron2 has options of its own, which nothing here reads.
    unknown = [name for name in saved if name not in known and name.startswith(("MODEL.KMAX.", "INPUT."))]
    if unknown:
        logger.warning(f"{file} is of another version; left out, as they are unknown here: {', '.join(unknown)}")
    require(merge_pairs(cfg, [part for pair in saved.items() if pair[0] in known for part in pair]))
    cfg.MODEL.WEIGHTS = file
    cfg.INPUT.MIN_SIZE_TEST = cfg.INPUT.MAX_SIZE_TEST = -1  # computed again: further options may change the crop
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    if categories:
        name = f"classes of {file}"
        coco_panoptic.register_records(name, list, **coco_panoptic.metadata_of(categories))
        cfg.DATASETS.TEST = (name,)
