"""Encodes masks in COCO's run-length encoding, on the device where they are."""

import numpy as np
import pycocotools.mask as mask_util
import torch


def encode_masks(masks: torch.Tensor) -> list[dict]:
    """Encodes masks (n, H, W), bool, as COCO's compressed RLEs, {"size": [H, W], "counts": str}.

    Only the ends of the runs leave the device, in one transfer, which is far faster than pycocotools' encoding of
    whole masks.
    """
    count, height, width = masks.shape
    # COCO's runs go down the columns, one column after the other; the first run is of zeros and may be empty.
    ends = masks.clone()
    ends[:, 1:] ^= masks[:, :-1]
    ends[:, 0, 1:] ^= masks[:, -1, :-1]
    # On the CPU, NumPy finds them several times as fast as PyTorch.
    flat = ends.flatten().nonzero()[:, 0].cpu().numpy() if ends.is_cuda else np.flatnonzero(ends.numpy())
    index, row, column = np.unravel_index(flat, (count, height, width))
    position = column * height + row
    order = np.lexsort((position, index))
    of_mask = np.split(position[order], np.searchsorted(index, np.arange(1, count)))
    runs = [
        {"size": [height, width], "counts": np.diff(positions, prepend=0, append=height * width).tolist()}
        for positions in of_mask[:count]
    ]
    rles = mask_util.frPyObjects(runs, height, width) if runs else []
    return [{"size": [height, width], "counts": rle["counts"].decode()} for rle in rles]
