"""COCONut: COCO's images with new panoptic annotations of the same classes (https://arxiv.org/abs/2404.08639)."""

from __future__ import annotations

import os

from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

from . import coco_panoptic

# name: the images' folders below coco. S has train2017, B the unlabeled images too, L also some of Objects365.
IMAGES = {
    "coconut_s": ("train2017",),
    "coconut_b": ("train2017", "unlabeled2017"),
    "coconut_l": ("train2017", "unlabeled2017", "objects365"),
    "relabeled_coco_val": ("val2017",),
}


def register(root: str) -> None:
    """Registers `coconut_{s,b,l}_panoptic` and `relabeled_coco_val_panoptic`; files are read on first use.

    Args:
        root: the folder that contains coco.
    """
    coco = os.path.join(root, "coco")
    for name, folders in IMAGES.items():
        coco_panoptic.register(
            f"{name}_panoptic",
            [os.path.join(coco, folder) for folder in folders],
            os.path.join(coco, name),
            os.path.join(coco, "annotations", f"{name}.json"),
            categories=COCO_CATEGORIES,
        )
