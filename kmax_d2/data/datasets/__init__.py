"""Datasets; importing it registers the embedded ones, and those that lie below $DETECTRON2_DATASETS."""

import os

from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

from . import ade20k, coco_panoptic, shapes, test_sets


def _register_shapes() -> None:
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


def _register_coco_unlabeled(root: str) -> None:
    """COCO's unlabeled images with panoptic labels that a model has predicted."""
    folder = os.path.join(root, "coco")
    coco_panoptic.register(
        "coco_2017_unlabeled_panoptic",
        os.path.join(folder, "unlabeled2017"),
        os.path.join(folder, "panoptic_unlabeled2017"),
        os.path.join(folder, "annotations", "panoptic_unlabeled2017.json"),
        categories=COCO_CATEGORIES,
    )


_ROOT = os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))
_register_shapes()
_register_coco_unlabeled(_ROOT)
ade20k.register(_ROOT)
test_sets.register(_ROOT)

__all__ = ["ade20k", "coco_panoptic", "shapes", "test_sets"]
