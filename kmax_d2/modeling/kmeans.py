"""k-means cross-attention, the heart of the model (Sec. 3.2, Eq. 7).

Every pixel is assigned to the one center whose mask logit is the largest; every center is updated with the sum of
its pixels' values.
"""

from __future__ import annotations

import torch
from torch import nn

from .layers import LinearBN, batch_norm, norm_vectors


def kmeans_assign(mask_logits: torch.Tensor) -> torch.Tensor:
    """The cluster of each pixel: (B, N, H, W) logits to (B, H, W) indices. No gradient passes."""
    return mask_logits.detach().argmax(dim=1)


def kmeans_update(assignment: torch.Tensor, values: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """The sum of each cluster's pixel values, equal to the product of the one-hot assignment with the values.

    Args:
        assignment: (B, H, W) cluster of each pixel.
        values: (B, C, H, W) value of each pixel.
        num_clusters: N.

    Returns:
        (B, N, C) sums; zero for a cluster without pixels.
    """
    batch, channels = values.shape[:2]
    # Not flatten and transpose: PyTorch's batch norm misreads the gradient's strides of that, on CPUs, for one image.
    rows = values.permute(0, 2, 3, 1).reshape(-1, channels)
    first_row = torch.arange(batch, device=values.device)[:, None] * num_clusters
    index = (assignment.flatten(1) + first_row).flatten()
    sums = values.new_zeros(batch * num_clusters, channels).index_add(0, index, rows)
    return sums.view(batch, num_clusters, channels)


class KMeansCrossAttention(nn.Module):
    """Update of the centers from the pixels assigned to them, without heads.

    Args:
        channels: channels of the pixel values.
        out_channels: channels of the centers.
        norm: name of the batch norm.
    """

    def __init__(self, channels: int, out_channels: int, *, norm: str):
        super().__init__()
        self.norm = batch_norm(norm, channels)
        self.projection = LinearBN(channels, out_channels, norm=norm, init_gain=0.0)

    def forward(self, mask_logits: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Mask logits (B, N, H, W) and pixel values (B, C, H, W) to an update of the centers (B, N, out_channels)."""
        # A sum over thousands of pixels needs float32, also under autocast.
        with torch.autocast(values.device.type, enabled=False):
            update = kmeans_update(kmeans_assign(mask_logits), values.float(), mask_logits.shape[1])
            return self.projection(norm_vectors(self.norm, update))
