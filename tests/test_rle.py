"""Run-length encoding against pycocotools."""

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch

from kmax_d2.evaluation.rle import encode_masks


@pytest.mark.parametrize("seed", range(4))
def test_encoded_masks_are_pycocotools(seed):
    generator = np.random.RandomState(seed)
    masks = generator.rand(6, *generator.randint(1, 12, 2)) < generator.rand(6, 1, 1)
    masks[0], masks[1] = False, True
    expected = [mask_util.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks]
    found = encode_masks(torch.from_numpy(masks))
    assert found == [rle | {"counts": rle["counts"].decode()} for rle in expected]


def test_no_masks_are_encoded():
    assert encode_masks(torch.zeros(0, 4, 5, dtype=torch.bool)) == []
