"""From a config name and options to a config that is ready to use, and from there to a model with weights."""

import argparse
import logging
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from detectron2.utils import comm
from torch import nn

from ..checkpoint import load_weights
from ..checkpoint.download import download, is_address
from ..checkpoint.origin import merge_checkpoint
from ..data.datasets import coco_panoptic, register_shared
from ..errors import UserError, did_you_mean
from ..options import check, default_config, merge_file, merge_pairs, set_test_size, warn_of_unused
from ..speed import inference_model

logger = logging.getLogger(__name__)

CONFIG_FOLDERS = (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")
SPLITS = ("TRAIN", "TEST")
CHECKPOINT = ".pth"  # ending of a checkpoint in place of a config


def config_file(name: str) -> Path:
    """Returns the path of a config: an existing file, or a name such as "coco/r50" in the project's configs.

    Raises UserError if there is no such config.
    """
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
    raise UserError(f"no config file {name}{did_you_mean(relative, known) or '.'} The project has {', '.join(known)}")


def load_config(file: str, options: Sequence = (), overrides: Sequence = ()) -> CfgNode:
    """Reads a config as it is written; :func:`ready_config` also prepares it for use.

    Args:
        file: a config file or name; a checkpoint of ours, which has its config; an empty string for the defaults.
        options: (name, value, name, value, ...), which take precedence over the file.
        overrides: the same, which take precedence over both.

    Raises UserError if the file is missing or broken, or that names all options that do not exist and values that do
    not fit.
    """
    cfg, faults = default_config(), []
    if file.endswith(CHECKPOINT):
        merge_checkpoint(cfg, file)
    elif file:
        faults = merge_file(cfg, config_file(file))
    check(cfg, faults + merge_pairs(cfg, options) + merge_pairs(cfg, overrides))
    warn_of_unused(cfg)
    set_test_size(cfg)
    return cfg


def ready_config(file: str, options: Sequence = (), overrides: Sequence = ()) -> CfgNode:
    """Returns a frozen config that is ready to use: own data registered, classes counted, device chosen.

    The arguments are those of :func:`load_config`: the user's options, and those that a program sets whatever the user
    asked for. Raises UserError if the config, an option, or a dataset is wrong.
    """
    cfg = load_config(file, options, overrides)
    wanted = cfg.MODEL.KMAX.NUM_CLASSES if "MODEL.KMAX.NUM_CLASSES" in options else 0
    prepare_datasets(cfg)
    if wanted not in (0, cfg.MODEL.KMAX.NUM_CLASSES):  # which own data replace, if it is a config's
        raise UserError(f"MODEL.KMAX.NUM_CLASSES is {wanted}, but your data have {cfg.MODEL.KMAX.NUM_CLASSES} classes")
    choose_device(cfg)
    cfg.freeze()
    return cfg


def setup(args: argparse.Namespace) -> CfgNode:
    """Returns the :func:`ready_config` of the parsed command line of train_net.py."""
    file = args.config_file
    if file.endswith(CHECKPOINT):
        args.config_file = ""  # Detectron2 reads the file too, for its log
    elif file:
        file = args.config_file = str(config_file(file))
    own = {"DATASETS.OWN_TRAIN": args.train_data, "DATASETS.OWN_TEST": args.test_data}
    overrides = [part for name, files in own.items() if files for part in (name, files)]
    cfg = ready_config(file, args.opts, overrides)
    batch = getattr(args, "scale_schedule", None)
    return cfg if batch is None else scale_schedule(cfg, batch)


def scale_schedule(cfg: CfgNode, batch: int) -> CfgNode:
    """Returns a frozen config for steps of `batch` images that sees as many images in all.

    The learning rate changes with the batch (https://arxiv.org/abs/1706.02677), and numbers of iterations inversely.
    Raises UserError for a batch below 1, and if an option no longer fits.
    """
    if batch < 1:
        raise UserError(f"--scale-schedule is {batch}, but must be the images of a step, at least 1")
    cfg = cfg.clone()
    cfg.defrost()
    solver = cfg.SOLVER
    kept = {name: solver[name] for name in ("REFERENCE_WORLD_SIZE", "STEPS")}
    solver.EMA.DECAY **= batch / solver.IMS_PER_BATCH
    solver.REFERENCE_WORLD_SIZE = solver.IMS_PER_BATCH  # as if each image had a process
    cfg = DefaultTrainer.auto_scale_workers(cfg, batch)
    cfg.SOLVER.update(kept)
    check(cfg)
    cfg.freeze()
    return cfg


def prepare_datasets(cfg: CfgNode) -> None:
    """Registers the config's own data, checks that its datasets are registered, and counts the classes, in place.

    Raises UserError for a dataset that is not registered or not panoptic, and for classes that contradict each other.
    """
    register_shared()
    for split in SPLITS:
        if cfg.DATASETS[f"OWN_{split}"]:
            cfg.DATASETS[split] = (_register_own(cfg, split),)
            cfg.MODEL.KMAX.NUM_CLASSES = 0
    _settle_own(cfg)
    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    for name in names:
        if name not in DatasetCatalog:
            raise UserError(f"no dataset {name} is registered{did_you_mean(name, DatasetCatalog.list())}")
        if _classes(name)[0] is None:
            raise UserError(f"the dataset {name} has no panoptic classes")
        things, stuff = (
            MetadataCatalog.get(name).get(f"{k}_dataset_id_to_contiguous_id", {}) for k in ("thing", "stuff")
        )
        if any(stuff.get(id_, index) != index for id_, index in things.items()):
            raise UserError(f"the dataset {name} numbers things and stuff separately: use one with a single numbering")
        if _classes(name) != _classes(names[0]):
            raise UserError(f"the datasets {names[0]} and {name} have different classes")
    if names:
        count = len(_classes(names[0])[0])
        if cfg.MODEL.KMAX.NUM_CLASSES not in (0, count):
            raise UserError(
                f"MODEL.KMAX.NUM_CLASSES is {cfg.MODEL.KMAX.NUM_CLASSES}, but {names[0]} has {count} classes; "
                "leave it 0 to take it from the dataset"
            )
        cfg.MODEL.KMAX.NUM_CLASSES = count
    elif cfg.MODEL.KMAX.NUM_CLASSES == 0:
        raise UserError("the number of classes is unknown: name a dataset or set MODEL.KMAX.NUM_CLASSES")


def _classes(name: str) -> tuple:
    """Returns the class names of a dataset, None if it is not panoptic, and which of its classes are things."""
    metadata = MetadataCatalog.get(name)
    return metadata.get("stuff_classes"), coco_panoptic.things_of(metadata)


def _register_own(cfg: CfgNode, split: str) -> str:
    """Registers the user's own data for a split under the name that is returned."""
    images, pngs, json_file = cfg.DATASETS[f"OWN_{split}"]
    for folder in (images, pngs):
        if not os.path.isdir(folder):
            raise UserError(f"no folder {folder}, which is named in DATASETS.OWN_{split}")
    path = Path(json_file).absolute()
    name = f"{path.parent.name}_{path.stem}"
    if name in DatasetCatalog and Path(MetadataCatalog.get(name).get("panoptic_json", "")).absolute() != path:
        name += f"_{zlib.crc32(bytes(path)):08x}"  # another file has this name
    coco_panoptic.register(name, images, pngs, json_file)
    return name


def _settle_own(cfg: CfgNode) -> None:
    """Leaves the config's datasets out if the user's own data for the other split have other classes."""
    train, test = (cfg.DATASETS[f"OWN_{split}"] for split in SPLITS)
    if train and test and os.path.realpath(train[0]) == os.path.realpath(test[0]):
        images = (coco_panoptic.read_json(files[2])["images"] for files in (train, test))
        train_names, test_names = ({image["file_name"] for image in each} for each in images)
        if shared := train_names & test_names:
            logger.warning(f"{len(shared)} test images are also training images, such as {min(shared)}")
    for own, other in (SPLITS, SPLITS[::-1]):
        if cfg.DATASETS[f"OWN_{own}"] and not cfg.DATASETS[f"OWN_{other}"]:
            classes = _classes(cfg.DATASETS[own][0])
            kept = tuple(name for name in cfg.DATASETS[other] if _classes(name) == classes)
            if kept != tuple(cfg.DATASETS[other]):
                logger.warning(f"DATASETS.{other} is left out, as your own data have other classes")
            cfg.DATASETS[other] = kept


def choose_device(cfg: CfgNode) -> None:
    """Falls back to the CPU if there is no GPU, and to a batch norm that runs on the device, in place."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
        logger.warning("no GPU found: running on the CPU")
    if cfg.MODEL.KMAX.NORM == "SyncBN" and (cfg.MODEL.DEVICE == "cpu" or comm.get_world_size() == 1):
        # PyTorch's SyncBatchNorm cannot train on a CPU; Detectron2's can, over gloo.
        cfg.MODEL.KMAX.NORM = "naiveSyncBN"


def dataset_metadata(cfg: CfgNode) -> Metadata:
    """Returns the metadata of a config's test (else training) dataset, such as its class names.

    Raises UserError if the config names no dataset.
    """
    names = [*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN]
    if not names:
        raise UserError("the class names are unknown: name a dataset in DATASETS.TEST")
    return MetadataCatalog.get(names[0])


def load_model(cfg: CfgNode) -> nn.Module:
    """Builds the model of a :func:`ready_config` with all weights of MODEL.WEIGHTS, in training mode.

    Raises UserError if the weights are missing or belong to another model.
    """
    if is_address(cfg.MODEL.WEIGHTS):
        download(cfg.MODEL.WEIGHTS)  # if this fails, it should fail before the model is built
    model = build_model(cfg)
    load_weights(model, cfg.MODEL.WEIGHTS)
    return model


def load_predictor(cfg: CfgNode) -> nn.Module:
    """Builds the model of a :func:`ready_config` with its weights, made as fast as the config asks for inference.

    Run it inside :func:`kmax_d2.speed.use_precision`. Raises UserError as :func:`load_model` does, and for options of
    inference that do not exist.
    """
    return inference_model(load_model(cfg), cfg)
