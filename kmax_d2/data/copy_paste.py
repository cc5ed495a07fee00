"""Panoptic copy-paste: segments of a second training image over the first (the paper's training, after MaX-DeepLab)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import cv2
import numpy as np
from torch.utils.data import Dataset, IterableDataset

from ..errors import UserError

PARTNER = "partner"  # a record's key for the record that is pasted from


class WithPartner(Dataset):
    """A dataset's records, each with a random one of the same dataset under "partner", for the mapper to paste from.

    Every record may be drawn, the same one too: a dataset of one image pastes from itself. The draw is NumPy's, in the
    loader's worker, so that it follows from the worker's seed; the records are the given dataset's, without a copy.

    Args:
        dataset: a list or map-style dataset of records.
    """

    def __init__(self, dataset: Sequence[dict] | Dataset):
        if isinstance(dataset, IterableDataset):
            raise UserError("an iterable dataset gives no random image to paste from: set INPUT.COPY_PASTE False")
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        return self.dataset[index] | {PARTNER: self.dataset[np.random.randint(len(self))]}


def copy_paste(
    first: tuple[np.ndarray, np.ndarray, list[int]],
    second: tuple[np.ndarray, np.ndarray, list[int]],
    things: Collection[int],
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Pastes all things and a random part of the stuff of the second image over the first, where they are.

    The official rule: of the second image's segments, void and padding counted, a number n from 0 to all is drawn
    uniformly and n are kept at random; the kept stuff and all things are pasted. How the kept stuff is distributed does
    not depend on what else is counted, so n is drawn of the stuff alone here. Void and padding are never pasted. Stuff
    of one class in both images is one mask.

    Args:
        first, second: images (3, H, W) uint8, all of one size; their labels (H, W) int16, -1 for padding, 0 for void
            and 1 + the index of the mask; and the class of each mask.
        things: the classes that are things.

    Returns:
        The same of the joint image. Masks that are wholly covered stay in the list of classes.
    """
    image, labels, classes = (part.copy() for part in first)
    pasted_image, pasted_labels, pasted_classes = second
    stuff = [index for index, category in enumerate(pasted_classes) if category not in things]
    kept = set(np.random.permutation(stuff)[: np.random.randint(len(stuff) + 1)])
    # From labels of the second image to joint ones, 0 for what is not pasted; the last entry is that of label -1.
    joint_label = np.zeros(len(pasted_classes) + 2, labels.dtype)
    for index, category in enumerate(pasted_classes):
        if category in things or (index in kept and category not in classes):
            classes.append(category)
            joint_label[index + 1] = len(classes)
        elif index in kept:
            joint_label[index + 1] = classes.index(category) + 1
    # The second image is small: most of it is padding, which need not be gone through.
    left, top, width, height = cv2.boundingRect((pasted_labels > 0).view(np.uint8))
    rows, columns = slice(top, top + height), slice(left, left + width)
    pasted = joint_label[pasted_labels[rows, columns]]
    np.copyto(labels[rows, columns], pasted, where=pasted > 0)
    np.copyto(image[:, rows, columns], np.ascontiguousarray(pasted_image[:, rows, columns]), where=pasted > 0)
    return image, labels, classes
