"""ADE20K's panoptic data, in the layout that Mask2Former prepares below $DETECTRON2_DATASETS."""

import os

from detectron2.data.datasets.builtin_meta import ADE20K_SEM_SEG_CATEGORIES

from . import coco_panoptic

# Contiguous stuff classes; the other hundred are the things of ADE20K's instance segmentation task.
STUFF = {
    *(0, 1, 2, 3, 4, 5, 6, 9, 11, 13, 16, 17, 21, 25, 26, 28, 29, 34, 40, 46, 48, 51, 52, 54, 59),
    *(60, 61, 63, 68, 77, 79, 84, 91, 94, 96, 99, 100, 101, 105, 106, 109, 113, 114, 117, 122, 128, 131, 140, 141, 145),
}
# Detectron2 lists several names per class, the most common first.
CATEGORIES = [
    {"id": index, "name": names.split(",")[0].strip(), "isthing": int(index not in STUFF)}
    for index, names in enumerate(ADE20K_SEM_SEG_CATEGORIES)
]


def register(root: str) -> None:
    """Registers `ade20k_panoptic_{train,val}` below `root`/ADEChallengeData2016; files are read on first use."""
    folder = os.path.join(root, "ADEChallengeData2016")
    for split, part in (("train", "training"), ("val", "validation")):
        name = f"ade20k_panoptic_{split}"
        images, pngs = os.path.join(folder, "images", part), os.path.join(folder, name)
        coco_panoptic.register(
            name,
            images,
            pngs,
            f"{pngs}.json",
            categories=CATEGORIES,
            evaluator_type="ade20k_panoptic_seg",
            replace=False,
        )
