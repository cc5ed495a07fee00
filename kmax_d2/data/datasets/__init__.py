"""Datasets; importing this package registers the embedded one and those below $DETECTRON2_DATASETS."""

import os

from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

from . import ade20k, coco_panoptic, coconut, mapillary, server_splits, shapes


def register_all(root: str) -> None:
    """Registers the datasets that Detectron2 itself lacks; files are read or drawn when a dataset is first used.

    Args:
        root: the folder that contains ADEChallengeData2016, cityscapes, coco, and mapillary_vistas.
    """
    folder = shapes.folder()
    for split in shapes.SPLITS:
        coco_panoptic.register(
            f"shapes_{split}",
            str(folder / split),
            str(folder / f"panoptic_{split}"),
            str(folder / f"panoptic_{split}.json"),
            categories=shapes.CATEGORIES,
            prepare=shapes.prepare,
        )
    coco = os.path.join(root, "coco")
    coco_panoptic.register(
        "coco_2017_unlabeled_panoptic",  # with labels that a model has predicted
        os.path.join(coco, "unlabeled2017"),
        os.path.join(coco, "panoptic_unlabeled2017"),
        os.path.join(coco, "annotations", "panoptic_unlabeled2017.json"),
        categories=COCO_CATEGORIES,
    )
    for dataset in (ade20k, coconut, mapillary):
        dataset.register(root)
    server_splits.register(root)


register_all(os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets")))

__all__ = ["ade20k", "coco_panoptic", "coconut", "mapillary", "register_all", "server_splits", "shapes"]
