"""To be replaced."""

from layouts import SCRIPTS, load_script, registered
from layouts.ade20k import miniature_ade20k
from layouts.cityscapes import miniature_cityscapes
from layouts.coco import COCO_SAMPLE, miniature_coco

__all__ = [
    "COCO_SAMPLE",
    "SCRIPTS",
    "load_script",
    "miniature_ade20k",
    "miniature_cityscapes",
    "miniature_coco",
    "registered",
]
