"""COCO's images with other annotations of its classes: COCONut's (https://arxiv.org/abs/2404.08639) or a model's."""

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
    """Registers the datasets below `root`/coco; files are read on first use."""
    coco = os.path.join(root, "coco")
    unlabeled = ("coco_2017_unlabeled_panoptic", os.path.join(coco, "unlabeled2017"), "panoptic_unlabeled2017")
    coconut = [(f"{name}_panoptic", [os.path.join(coco, each) for each in IMAGES[name]], name) for name in IMAGES]
    for dataset, images, name in (unlabeled, *coconut):
        pngs, json_file = os.path.join(coco, name), os.path.join(coco, "annotations", f"{name}.json")
        coco_panoptic.register(dataset, images, pngs, json_file, categories=COCO_CATEGORIES, replace=False)
