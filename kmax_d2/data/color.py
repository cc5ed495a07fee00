"""The color policy of the official training: one of five pairs of Pillow operations, a reduced AutoAugment."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from detectron2.data.transforms import Augmentation, PILColorTransform
from fvcore.transforms.transform import NoOpTransform, Transform, TransformList
from PIL import Image, ImageEnhance, ImageOps

MAX_LEVEL = 10


class Operation(NamedTuple):
    """A Pillow operation of the policy, applied with a probability at a level of 0 to 10."""

    name: str
    probability: float
    level: float


POLICY = (
    (Operation("Sharpness", 0.4, 7), Operation("Brightness", 0.2, 10)),
    (Operation("Equalize", 0.0, 9), Operation("Contrast", 0.2, 10)),
    (Operation("Sharpness", 0.2, 9), Operation("Color", 0.2, 9)),
    (Operation("Solarize", 0.2, 7), Operation("Equalize", 0.6, 9)),
    (Operation("Sharpness", 0.2, 1), Operation("Equalize", 0.2, 7)),
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
        threshold = math.floor(level / MAX_LEVEL * 256)
        return lambda image: ImageOps.solarize(image, threshold)
    factor = level / MAX_LEVEL * 1.8 + 0.1
    enhancer = getattr(ImageEnhance, name)
    return lambda image: enhancer(image).enhance(factor)


class ColorPolicy(Augmentation):
    """Draws one of the policy's pairs uniformly, and each of its two operations with its own probability.

    Args:
        level: factor on all levels.
    """

    def __init__(self, level: float = 1.0):
        super().__init__()
        self.level = level

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draws the transform for an RGB uint8 image (H, W, 3)."""
        pair = POLICY[np.random.randint(len(POLICY))]
        chosen = [op for op in pair if np.random.uniform() < op.probability]
        if not chosen:
            return NoOpTransform()
        return TransformList([PILColorTransform(pillow_operation(op.name, op.level * self.level)) for op in chosen])
