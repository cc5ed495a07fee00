"""Panoptic copy-paste: segments of a second training image over the first, as in the paper and in MaX-DeepLab."""

from collections.abc import Collection

import cv2
import numpy as np

PASTE_SOURCE = "paste_source"  # a record's key for the record to paste from

# An image (3, H, W) uint8; labels (H, W) int16: -1 padding, 0 void, 1 + the index of the mask; each mask's class.
LabeledImage = tuple[np.ndarray, np.ndarray, list[int]]


def copy_paste(first: LabeledImage, second: LabeledImage, things: Collection[int]) -> LabeledImage:
    """Pastes all things and a random subset of the stuff of the second image over the first, at the same position.

    The official rule draws a number n uniformly from 0 to the count of the second image's segments, void and padding
    included, keeps n at random, and pastes the kept stuff and all things. The distribution of the kept stuff does not
    depend on the other segments, so n counts only stuff here. Void and padding are never pasted. Stuff of one class in
    both images becomes one mask.

    The images have the same size and are not changed; `things` are the classes that are things. Masks that are entirely
    covered remain in the list of classes that is returned.
    """
    image, labels, classes = first[0].copy(), first[1].copy(), first[2].copy()
    pasted_image, pasted_labels, pasted_classes = second
    stuff = [index for index, category in enumerate(pasted_classes) if category not in things]
    kept = set(np.random.permutation(stuff)[: np.random.randint(len(stuff) + 1)])
    # Maps labels of the second image to combined ones, 0 if not pasted; label -1 indexes the last entry.
    combined = np.zeros(len(pasted_classes) + 2, labels.dtype)
    for index, category in enumerate(pasted_classes):
        if category in things or (index in kept and category not in classes):
            classes.append(category)
            combined[index + 1] = len(classes)
        elif index in kept:
            combined[index + 1] = classes.index(category) + 1
    # The second image is small: skip the padding around it.
    left, top, width, height = cv2.boundingRect((pasted_labels > 0).view(np.uint8))
    rows, columns = slice(top, top + height), slice(left, left + width)
    pasted = combined[pasted_labels[rows, columns]]
    np.copyto(labels[rows, columns], pasted, where=pasted > 0)
    np.copyto(image[:, rows, columns], np.ascontiguousarray(pasted_image[:, rows, columns]), where=pasted > 0)
    return image, labels, classes
