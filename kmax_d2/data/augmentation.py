"""Geometry of the training and test images, as Detectron2 augmentations."""

import cv2
import numpy as np
from detectron2.data.transforms import Augmentation, ResizeTransform
from fvcore.transforms.transform import CropTransform, NoOpTransform, PadTransform, Transform, TransformList


class ScaleTransform(ResizeTransform):
    """Resizes images bilinearly with Pillow, and labels (H, W) of any integer type to the nearest pixel."""

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Resizes labels (H, W)."""
        return cv2.resize(segmentation, (self.new_w, self.new_h), interpolation=cv2.INTER_NEAREST_EXACT)


class ResizeToFit(Augmentation):
    """Resizes an image, up or down, to just fit a given size, times a random scale.

    Args:
        size: (height, width) in pixels; None keeps the image's own size.
        scale_range: (smallest, largest) random scale.
        scale_steps: number of evenly spaced scales to draw from; 0 draws from the continuous range.
    """

    def __init__(
        self, size: tuple[int, int] | None, scale_range: tuple[float, float] = (1.0, 1.0), scale_steps: int = 0
    ):
        super().__init__()
        self.size, self.scale_range, self.scale_steps = size, scale_range, scale_steps

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draws the transform for an image (H, W, ...)."""
        height, width = image.shape[:2]
        smallest, largest = self.scale_range
        if self.scale_steps > 1:
            scale = smallest + (largest - smallest) * np.random.randint(self.scale_steps) / (self.scale_steps - 1)
        else:
            scale = np.random.uniform(smallest, largest)
        if self.size is not None:
            scale *= min(self.size[0] / height, self.size[1] / width)
        new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
        if (new_height, new_width) == (height, width):
            return NoOpTransform()
        return ScaleTransform(height, width, new_height, new_width)


class RandomPadCrop(Augmentation):
    """Pads where an image is smaller than the crop, at a random offset, and crops at random where it is larger.

    The crop has `size`, (height, width) in pixels. Padded pixels are 0 in the image and `seg_pad_value` in the labels.
    """

    def __init__(self, size: tuple[int, int], seg_pad_value: int):
        super().__init__()
        self.size, self.seg_pad_value = size, seg_pad_value

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draws the transform for an image (H, W, 3)."""
        height, width = image.shape[:2]
        missing = [max(0, size - side) for size, side in zip(self.size, (height, width), strict=True)]
        extra = [max(0, side - size) for size, side in zip(self.size, (height, width), strict=True)]
        top, left = (np.random.randint(m + 1) for m in missing)
        y, x = (np.random.randint(e + 1) for e in extra)
        crop_height, crop_width = min(height, self.size[0]), min(width, self.size[1])
        crop = CropTransform(x, y, crop_width, crop_height, width, height)
        right, bottom = missing[1] - left, missing[0] - top
        pad = PadTransform(left, top, right, bottom, crop_width, crop_height, seg_pad_value=self.seg_pad_value)
        return TransformList([crop, pad] if any(missing) else [crop])
