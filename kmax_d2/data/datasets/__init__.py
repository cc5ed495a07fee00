"""Datasets; importing this package registers the embedded one and those below $DETECTRON2_DATASETS."""

import os

from . import ade20k, cityscapes, coco_panoptic, coconut, mapillary, server_splits, shapes


def register_all(root: str) -> None:
    """Registers all datasets of this project; files are read or drawn when a dataset is first used.

    Names that are registered already are left alone. The folder `root` contains ADEChallengeData2016, cityscapes, coco,
    and mapillary_vistas.
    """
    _register_unshared(root)
    ade20k.register(root)


def register_shared() -> None:
    """Registers ADE20K below $DETECTRON2_DATASETS unless that is done.

    Mask2Former and its descendants register the same names, and fail if they exist. So these wait until a config or a
    tool of this project needs them.
    """
    ade20k.register(_root())


def _register_unshared(root: str) -> None:
    for split in shapes.SPLITS:
        images, pngs = (str(shapes.folder() / name) for name in (split, f"panoptic_{split}"))
        coco_panoptic.register(
            f"shapes_{split}",
            images,
            pngs,
            f"{pngs}.json",
            categories=shapes.CATEGORIES,
            prepare=shapes.prepare,
            replace=False,
        )
    for dataset in (coconut, mapillary, server_splits):
        dataset.register(root)
    cityscapes.register()


def _root() -> str:
    return os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))


_register_unshared(_root())

__all__ = ["ade20k", "cityscapes", "coco_panoptic", "coconut", "mapillary", "register_all", "register_shared", "shapes"]
