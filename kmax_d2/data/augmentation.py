"""Geometry of the training and test images, as Detectron2 augmentations."""

from __future__ import annotations

import cv2
import numpy as np
from detectron2.data.transforms import Augmentation, ResizeTransform
from fvcore.transforms.transform import CropTransform, NoOpTransform, PadTransform, Transform, TransformList

PAD_VALUE = 127  # the mapper makes 127.5 of it, zero after scaling, which no byte says


class ScaleTransform(ResizeTransform):
    """Resizes images bilinearly with Pillow, and labels of any integer type (H, W) to the nearest."""

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return cv2.resize(segmentation, (self.new_w, self.new_h), interpolation=cv2.INTER_NEAREST_EXACT)


class ResizeToFit(Augmentation):
    """Resizes an image so that it just fits a size, also upwards, times a random scale.

    Args:
        size: (height, width) in pixels; None leaves the image its own size.
        scale_range: (least, largest) of the random scale.
        scale_steps: number of evenly spaced scales to draw from; 0 draws from the whole range.
    """

    def __init__(
        self,
        size: tuple[int, int] | None,
        scale_range: tuple[float, float] = (1.0, 1.0),
        scale_steps: int = 0,
    ):
        super().__init__()
        self.size = size
        self.scale_range = scale_range
        self.scale_steps = scale_steps

    def get_transform(self, image: np.ndarray) -> Transform:
        """The transform for an image (H, W, ...)."""
        height, width = image.shape[:2]
        scale = self._random_scale()
        if self.size is not None:
            scale *= min(self.size[0] / height, self.size[1] / width)
        new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
        if (new_height, new_width) == (height, width):
            return NoOpTransform()
        return ScaleTransform(height, width, new_height, new_width)

    def _random_scale(self) -> float:
        least, largest = self.scale_range
        if self.scale_steps > 1:
            return least + (largest - least) * np.random.randint(self.scale_steps) / (self.scale_steps - 1)
        return np.random.uniform(least, largest)


class RandomPadCrop(Augmentation):
    """Pads with grey (labels: `seg_pad_value`) at a random offset where smaller than the crop, crops where larger.

    Args:
        size: (height, width) of the crop in pixels.
        seg_pad_value: label of padded pixels.
    """

    def __init__(self, size: tuple[int, int], seg_pad_value: int):
        super().__init__()
        self.size = size
        self.seg_pad_value = seg_pad_value

    def get_transform(self, image: np.ndarray) -> Transform:
        """The transform for an image (H, W, 3)."""
        height, width = image.shape[:2]
        missing = [max(0, size - side) for size, side in zip(self.size, (height, width), strict=True)]
        extra = [max(0, side - size) for size, side in zip(self.size, (height, width), strict=True)]
        top, left = (np.random.randint(m + 1) for m in missing)
        y, x = (np.random.randint(e + 1) for e in extra)
        steps = []
        if any(extra):
            steps.append(CropTransform(x, y, min(width, self.size[1]), min(height, self.size[0]), width, height))
        if any(missing):
            pad = PadTransform(
                left,
                top,
                missing[1] - left,
                missing[0] - top,
                orig_w=min(width, self.size[1]),
                orig_h=min(height, self.size[0]),
                pad_value=PAD_VALUE,
                seg_pad_value=self.seg_pad_value,
            )
            steps.append(pad)
        return TransformList(steps) if steps else NoOpTransform()
