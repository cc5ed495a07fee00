"""The color policy of the official training: one of five pairs of Pillow operations, a reduced AutoAugment."""

import math
from collections.abc import Callable

import numpy as np
from detectron2.data.transforms import Augmentation, PILColorTransform
from fvcore.transforms.transform import NoOpTransform, Transform, TransformList
from PIL import Image, ImageEnhance, ImageOps

# Pairs of operations, each with its probability and its level of 0 to 10.
POLICY = (
    (("Sharpness", 0.4, 7), ("Brightness", 0.2, 10)),
    (("Equalize", 0.0, 9), ("Contrast", 0.2, 10)),
    (("Sharpness", 0.2, 9), ("Color", 0.2, 9)),
    (("Solarize", 0.2, 7), ("Equalize", 0.6, 9)),
    (("Sharpness", 0.2, 1), ("Equalize", 0.2, 7)),
)


def pillow_operation(name: str, level: float) -> Callable[[Image.Image], Image.Image]:
    """Returns an operation at a given level as a function of a Pillow image.

    Args:
        name: "Equalize", "Solarize" or the name of an enhancer in :mod:`PIL.ImageEnhance`.
        level: 0 to 10; an enhancer's factor is level / 10 · 1.8 + 0.1, Solarize's threshold floor(level / 10 · 256).
    """
    if name == "Equalize":
        return ImageOps.equalize
    if name == "Solarize":
        threshold = math.floor(level / 10 * 256)
        return lambda image: ImageOps.solarize(image, threshold)
    factor = level / 10 * 1.8 + 0.1
    enhancer = getattr(ImageEnhance, name)
    return lambda image: enhancer(image).enhance(factor)


class ColorPolicy(Augmentation):
    """Draws one of the policy's pairs uniformly, and each of its two operations with its own probability.

    All levels are multiplied by `level`.
    """

    def __init__(self, level: float = 1.0):
        super().__init__()
        self.level = level

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draws the transform for an RGB uint8 image (H, W, 3)."""
        pair = POLICY[np.random.randint(len(POLICY))]
        chosen = [(name, level) for name, probability, level in pair if np.random.uniform() < probability]
        if not chosen:
            return NoOpTransform()
        return TransformList([PILColorTransform(pillow_operation(name, level * self.level)) for name, level in chosen])
