"""ADE20K: drawn scenes with both kinds of annotations, prepared by the project's script."""

from pathlib import Path

import numpy as np
from PIL import Image

from . import prepare

SIZES = [(48, 64), (64, 48), (30, 40)]  # height and width


def miniature_ade20k(folder):
    """Writes `ADEChallengeData2016/` with a gray image, images of several sizes, and one without a label."""
    root = Path(folder) / "ADEChallengeData2016"
    for split, name in (("train", "training"), ("val", "validation")):
        for kind in ("images", "annotations", "annotations_instance"):
            (root / kind / name).mkdir(parents=True)
        for number, size in enumerate(SIZES, start=1):
            semantic, instances = _scene(size, number)
            if (split, number) == ("val", 3):
                semantic[:], instances[:] = 0, 0
            stem = f"ADE_{split}_{number:08d}"
            Image.fromarray(semantic).save(root / f"annotations/{name}/{stem}.png")
            Image.fromarray(instances).save(root / f"annotations_instance/{name}/{stem}.png")
            picture = Image.fromarray(np.stack([12 * semantic, 40 * instances[..., 1], 100 + 2 * semantic], axis=-1))
            picture.convert("L" if number == 1 else "RGB").save(root / f"images/{name}/{stem}.jpg")
    prepare("ade20k", root)


def _scene(size, number):
    """A wall and a floor with beds, and a person and a door in no instance: void in the panoptic data."""
    height, width = size
    semantic, instances = np.zeros(size, np.uint8), np.zeros((*size, 3), np.uint8)
    semantic[: height // 2], semantic[height // 2 : -6] = 1, 4
    for index, left in enumerate(range(2, width - 13, 17), start=1):
        region = slice(9 + 3 * number, height - 12), slice(left, left + 13)
        semantic[region] = 8
        instances[region] = 1, index, 0
    semantic[2:8, -12:-2], semantic[2:6, 2:9] = 13, 15
    return semantic, instances
