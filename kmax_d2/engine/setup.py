"""From a command line to a config that is ready to train, evaluate or segment with."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_argument_parser
from detectron2.utils import comm

from ..config import add_kmax_config
from ..data.datasets import coco_panoptic
from ..errors import UserError, did_you_mean

logger = logging.getLogger(__name__)

CONFIG_FOLDERS = (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's own arguments, and those that name a dataset of one's own."""
    parser = default_argument_parser()
    for name, split in (("--train-data", "training"), ("--test-data", "test")):
        parser.add_argument(
            name,
            nargs=3,
            metavar=("IMAGES", "PNGS", "JSON"),
            help=f"{split} data of your own in COCO panoptic format: image folder, PNG folder, JSON file",
        )
    return parser


def config_file(name: str) -> Path:
    """The path of a config: a file, or a name such as "coco/r50" below the project's configs."""
    if Path(name).is_file():
        return Path(name)
    relative = name.removeprefix("configs/").removesuffix(".yaml")
    for folder in CONFIG_FOLDERS:
        if (folder / f"{relative}.yaml").is_file():
            return folder / f"{relative}.yaml"
    known = sorted(
        str(path.relative_to(folder).with_suffix(""))
        for folder in CONFIG_FOLDERS
        for path in folder.rglob("*.yaml")
        if "base" not in path.stem.lower()
    )
    raise UserError(f"no config file {name}{did_you_mean(relative, known)} The project has {', '.join(known)}")


def load_config(file: str, options: Sequence[str] = ()) -> CfgNode:
    """Reads a config file (none if empty) over the defaults, and options as (name, value, name, value, ...).

    Raises UserError for a missing or broken file, a misspelt option or a value of the wrong type.
    """
    cfg = get_cfg()
    add_kmax_config(cfg)
    try:
        if file:
            cfg.merge_from_file(str(config_file(file)))
        if len(options) % 2:
            raise UserError(f"options come in pairs of a name and a value; {options[-1]} is alone")
        cfg.merge_from_list(list(options))
    except KeyError as error:
        name = str(error.args[0]).removeprefix("Non-existent config key:").strip()
        raise UserError(f"no option {name}{did_you_mean(name, _option_names(cfg))}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    except (ValueError, AssertionError) as error:
        wrong = [name for name in options[::2] if name not in set(_option_names(cfg))]
        if wrong:
            raise UserError(f"no option {wrong[0]}{did_you_mean(wrong[0], _option_names(cfg))}") from error
        raise UserError(f"an option has a value that does not fit: {' '.join(str(error).split())}") from error
    return cfg


def _option_names(node: CfgNode, prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from _option_names(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def setup(args: argparse.Namespace) -> CfgNode:
    """The frozen config of a command line: own data registered, classes counted, device and batch norm chosen."""
    if args.config_file:
        args.config_file = str(config_file(args.config_file))  # Detectron2 reads the file too, for the log
    cfg = load_config(args.config_file, args.opts)
    for name, files in (("OWN_TRAIN", args.train_data), ("OWN_TEST", args.test_data)):
        if files:
            cfg.DATASETS[name] = files
    prepare_datasets(cfg)
    choose_device(cfg)
    cfg.freeze()
    return cfg


def prepare_datasets(cfg: CfgNode) -> None:
    """Registers the config's own data, checks that its datasets are there, and counts the classes, in place."""
    for split in ("TRAIN", "TEST"):
        files = cfg.DATASETS[f"OWN_{split}"]
        if not files:
            continue
        if len(files) != 3:
            raise UserError(f"DATASETS.OWN_{split} is (image folder, PNG folder, JSON file), not {list(files)}")
        images, pngs, json_file = files
        for folder in (images, pngs):
            if not os.path.isdir(folder):
                raise UserError(f"no folder {folder}, which DATASETS.OWN_{split} names")
        name = f"{Path(json_file).absolute().parent.name}_{Path(json_file).stem}"
        coco_panoptic.register(name, images, pngs, json_file)
        cfg.DATASETS[split] = (name,)
        cfg.MODEL.KMAX.NUM_CLASSES = 0
    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    for name in names:
        if name not in DatasetCatalog:
            raise UserError(f"no dataset {name} is registered{did_you_mean(name, DatasetCatalog.list())}")
    classes = {name: MetadataCatalog.get(name).get("stuff_classes") for name in names}
    for name, known in classes.items():
        if known is None:
            raise UserError(f"the dataset {name} has no panoptic classes")
        if known != classes[names[0]]:
            raise UserError(f"the datasets {names[0]} and {name} have different classes")
    if names:
        count = len(classes[names[0]])
        if cfg.MODEL.KMAX.NUM_CLASSES not in (0, count):
            raise UserError(
                f"MODEL.KMAX.NUM_CLASSES is {cfg.MODEL.KMAX.NUM_CLASSES}, but {names[0]} has {count} classes; "
                "leave it 0 to take it from the dataset"
            )
        cfg.MODEL.KMAX.NUM_CLASSES = count
    elif cfg.MODEL.KMAX.NUM_CLASSES == 0:
        raise UserError("the number of classes is unknown: name a dataset or set MODEL.KMAX.NUM_CLASSES")


def choose_device(cfg: CfgNode) -> None:
    """Takes the CPU where there is no GPU, and the batch norm that runs there, in place."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
        logger.warning("no GPU found: running on the CPU")
    if cfg.MODEL.KMAX.NORM == "SyncBN" and (cfg.MODEL.DEVICE == "cpu" or comm.get_world_size() == 1):
        # PyTorch's SyncBatchNorm refuses to train on a CPU; Detectron2's works there, over gloo.
        cfg.MODEL.KMAX.NORM = "naiveSyncBN"
