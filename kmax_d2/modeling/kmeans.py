"""k-means cross-attention, the heart of the model (Sec. 3.2, Eq. 7).

Every pixel is assigned to the one center whose mask logit is the largest; every center is updated with the sum of
its pixels' values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .cross_attention import CROSS_ATTENTION_REGISTRY
from .layers import ConvBN, LinearBN, batch_norm, norm_vectors, places, truncated_normal_


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
    rows = places(values).flatten(0, 1)
    first_row = torch.arange(batch, device=values.device)[:, None] * num_clusters
    index = (assignment.flatten(1) + first_row).flatten()
    sums = values.new_zeros(batch * num_clusters, channels).index_add(0, index, rows)
    return sums.view(batch, num_clusters, channels)


@CROSS_ATTENTION_REGISTRY.register()
class KMeansCrossAttention(nn.Module):
    """Update of the centers from the pixels assigned to them, without heads.

    Args:
        channels: channels of centers, pixels and values.
        key_channels, num_heads: of other cross-attentions; k-means has neither keys nor heads.
        norm: name of the batch norm.
    """

    def __init__(self, channels: int, *, key_channels: int, num_heads: int, norm: str):
        super().__init__()
        self.value = ConvBN(channels, channels, norm=norm)
        truncated_normal_(self.value.conv.weight, channels**-0.5)
        self.norm = batch_norm(norm, channels)
        self.projection = LinearBN(channels, channels, norm=norm, init_gain=0.0)

    def cluster_sums(self, mask_logits: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """(B, N, H, W) logits and (B, C, H, W) values to the sum of each cluster's values, (B, N, C)."""
        return kmeans_update(kmeans_assign(mask_logits), values, mask_logits.shape[1])

    def forward(self, query: torch.Tensor, pixels: torch.Tensor, mask_logits: torch.Tensor) -> torch.Tensor:
        """Pixels (B, C, H, W) and mask logits (B, N, H, W) to an update of the centers (B, N, C).

        The centers `query` play no part beyond the mask logits that they gave.
        """
        values = self.value(pixels)
        # A sum over thousands of pixels needs float32, also under autocast.
        with torch.autocast(values.device.type, enabled=False):
            update = self.cluster_sums(mask_logits.float(), values.float())
            return self.projection(norm_vectors(self.norm, update))


@CROSS_ATTENTION_REGISTRY.register()
class GumbelCrossAttention(KMeansCrossAttention):
    """The ablation's Gumbel-softmax: assignments are sampled in training, and gradients pass through them.

    A pixel's one-hot assignment is drawn with the softmax probabilities of its logits; its gradient is that of the
    relaxed sample (straight-through, https://arxiv.org/abs/1611.01144). At test it is k-means.
    """

    def cluster_sums(self, mask_logits: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().cluster_sums(mask_logits, values)
        assignment = F.gumbel_softmax(mask_logits.flatten(2), hard=True, dim=1)
        return assignment @ places(values)
