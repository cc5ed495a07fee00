"""k-means cross-attention, the heart of the model (Sec. 3.2, Eq. 7).

Every pixel is assigned to the one center whose mask logit is the largest; every center is updated with the sum of
its pixels' values.
"""

import torch
from detectron2.utils.registry import Registry
from timm.layers import trunc_normal_tf_
from torch import nn

from .layers import ConvBN, LinearBN, batch_norm, flatten_pixels, norm_vectors

CROSS_ATTENTION_REGISTRY = Registry("CROSS_ATTENTION")
CROSS_ATTENTION_REGISTRY.__doc__ = """
Updates of the centers from the pixels, named by `MODEL.KMAX.TRANSFORMER_DECODER.CROSS_ATTENTION`. Each is called with
`(channels, *, key_channels, num_heads, norm)`. Its forward pass takes the projected centers (B, N, C), the projected
pixels (B, C, H, W) and the mask logits (B, N, H, W), and returns an update of the centers (B, N, C).
"""


def kmeans_assign(mask_logits: torch.Tensor) -> torch.Tensor:
    """Assigns each pixel to a cluster: (B, N, H, W) logits to (B, H, W) indices. No gradient passes."""
    return mask_logits.detach().argmax(dim=1)


def kmeans_update(assignment: torch.Tensor, values: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """Sums the values (B, C, H, W) of the pixels assigned (B, H, W) to each cluster: (B, N, C), zero for none.

    This equals the product of the one-hot assignment with the values.
    """
    batch, channels = values.shape[:2]
    rows = flatten_pixels(values).flatten(0, 1)
    first_row = torch.arange(batch, device=values.device)[:, None] * num_clusters
    index = (assignment.flatten(1) + first_row).flatten()
    sums = values.new_zeros(batch * num_clusters, channels).index_add(0, index, rows)
    return sums.view(batch, num_clusters, channels)


@CROSS_ATTENTION_REGISTRY.register()
class KMeansCrossAttention(nn.Module):
    """Update of the centers from the pixels assigned to them.

    `key_channels` and `num_heads` are of other cross-attentions; k-means has neither keys nor heads.
    """

    def __init__(self, channels: int, *, key_channels: int, num_heads: int, norm: str):
        super().__init__()
        self.value = ConvBN(channels, channels, norm=norm)
        trunc_normal_tf_(self.value.conv.weight, std=channels**-0.5)
        self.norm = batch_norm(norm, channels)
        self.projection = LinearBN(channels, channels, norm=norm, init_gain=0.0)

    def cluster_sums(self, mask_logits: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """(B, N, H, W) logits and (B, C, H, W) values to the sum of each cluster's values, (B, N, C)."""
        return kmeans_update(kmeans_assign(mask_logits), values, mask_logits.shape[1])

    def forward(self, query: torch.Tensor, pixels: torch.Tensor, mask_logits: torch.Tensor) -> torch.Tensor:
        """Pixels (B, C, H, W) and mask logits (B, N, H, W) to an update of the centers (B, N, C).

        The projected centers `query` act only through the mask logits.
        """
        values = self.value(pixels)
        # A sum over thousands of pixels needs float32, also under autocast.
        with torch.autocast(values.device.type, enabled=False):
            update = self.cluster_sums(mask_logits.float(), values.float())
            return self.projection(norm_vectors(self.norm, update))
