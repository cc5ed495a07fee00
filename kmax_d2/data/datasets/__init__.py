"""Datasets; importing this package registers the embedded one and those below $DETECTRON2_DATASETS."""

import os

from . import ade20k, coco_panoptic, coconut, mapillary, server_splits, shapes


def register_all(root: str) -> None:
    """Registers the datasets that Detectron2 itself lacks; files are read or drawn when a dataset is first used.

    The folder `root` contains ADEChallengeData2016, cityscapes, coco, and mapillary_vistas.
    """
    for split in shapes.SPLITS:
        images, pngs = (str(shapes.folder() / name) for name in (split, f"panoptic_{split}"))
        coco_panoptic.register(
            f"shapes_{split}", images, pngs, f"{pngs}.json", categories=shapes.CATEGORIES, prepare=shapes.prepare
        )
    for dataset in (ade20k, coconut, mapillary):
        dataset.register(root)
    server_splits.register(root)


register_all(os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets")))

__all__ = ["ade20k", "coco_panoptic", "coconut", "mapillary", "register_all", "server_splits", "shapes"]
