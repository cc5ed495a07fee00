"""Miniatures of the datasets in their real layouts, as downloads unpack and as this project's scripts prepare them."""

import contextlib
import importlib
import io
import os
import sys
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import _get_builtin_metadata
from detectron2.data.datasets.cityscapes_panoptic import register_all_cityscapes_panoptic
from detectron2.data.datasets.coco_panoptic import register_coco_panoptic

from kmax_d2.data.datasets import register_all

# How the names of this project's datasets begin, which it registers only where they are absent.
OURS = ("ade20k_panoptic", "coconut_", "relabeled_coco", "mapillary_vistas", "coco_2017_unlabeled_panoptic")
OURS += ("coco_2017_test", "cityscapes_fine_panoptic_test")
SCRIPTS = str(Path(__file__).parents[2] / "datasets")


def load_script(name):
    """Imports a script of datasets/ with that folder on the search path, as in a run of the script."""
    if SCRIPTS not in sys.path:
        sys.path.insert(0, SCRIPTS)
    return importlib.import_module(name)


def prepare(name, root):
    """Runs the project's script for a dataset."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        load_script(f"prepare_{name}_panoptic").main(["--root", str(root), "--workers", "1"])


@contextlib.contextmanager
def registered(folder):
    """Registers COCO, Cityscapes and ADE20K below a folder, without the environment variable."""
    _register(str(folder))
    try:
        yield
    finally:
        _register(os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets")))


def forget(names=()):
    """Removes this project's datasets from the catalogs, and others with these names."""
    for name in [*names, *(name for name in DatasetCatalog.list() if name.startswith(OURS))]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def _register(root):
    coco = {f"coco_2017_{split}_panoptic": f"{split}2017" for split in ("train", "val")}
    cityscapes = [f"cityscapes_fine_panoptic_{split}" for split in ("train", "val")]
    forget([*coco, *cityscapes])
    for name, split in coco.items():
        register_coco_panoptic(
            name,
            _get_builtin_metadata("coco_panoptic_standard"),
            os.path.join(root, "coco", split),
            os.path.join(root, "coco", f"panoptic_{split}"),
            os.path.join(root, "coco", "annotations", f"panoptic_{split}.json"),
            os.path.join(root, "coco", "annotations", f"instances_{split}.json"),
        )
    register_all_cityscapes_panoptic(root)
    register_all(root)
