"""Segment ids as the colors of panoptic PNGs: id = R + 256 G + 256² B, and 0 is void (COCO's panoptic format)."""

import numpy as np

NUM_IDS = 1 << 24  # distinct colors


def rgb2id(colors: np.ndarray) -> np.ndarray:
    """Converts colors (H, W, 3), uint8 in RGB, to ids (H, W), int32 in 0..2^24 - 1."""
    red, green, blue = np.moveaxis(colors.astype(np.int32), -1, 0)
    return red | green << 8 | blue << 16


def id2rgb(ids: np.ndarray) -> np.ndarray:
    """Converts ids (H, W) in 0..2^24 - 1 to colors (H, W, 3), uint8 in RGB."""
    return np.stack([ids, ids >> 8, ids >> 16], axis=-1).astype(np.uint8)
