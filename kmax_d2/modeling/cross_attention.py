"""The ablation's alternatives to k-means: softmax cross-attention, in two forms, and Gumbel-softmax assignment."""

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_tf_
from torch import nn

from .kmeans import CROSS_ATTENTION_REGISTRY, KMeansCrossAttention
from .layers import ConvBN, LinearBN, batch_norm, flatten_pixels, norm_vectors


@CROSS_ATTENTION_REGISTRY.register()
class SoftmaxCrossAttention(nn.Module):
    """The original cross-attention (Eq. 4): every center reads all pixels through a softmax over them.

    Centers, pixels and values have `channels`, queries and keys `key_channels` over all heads.
    """

    def __init__(self, channels: int, *, key_channels: int, num_heads: int, norm: str):
        super().__init__()
        self.num_heads = num_heads
        self.query = LinearBN(channels, key_channels, norm=norm, init_std=channels**-0.5)
        self.key = ConvBN(channels, key_channels, norm=norm)
        self.value = ConvBN(channels, channels, norm=norm)
        for layer in (self.key, self.value):
            trunc_normal_tf_(layer.conv.weight, std=channels**-0.5)
        # With batch norms where others scale by 1/√d, as in the self-attention.
        self.norm_logits = batch_norm(norm, num_heads)
        self.norm = batch_norm(norm, channels)
        self.projection = LinearBN(channels, channels, norm=norm, init_gain=0.0)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, M, C) to (B, heads, M, C / heads)."""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def keys_and_values(self, query: torch.Tensor, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the centers read: keys (B, M, key_channels) and values (B, M, C) of M positions."""
        return flatten_pixels(self.key(pixels)), flatten_pixels(self.value(pixels))

    def forward(self, query: torch.Tensor, pixels: torch.Tensor, mask_logits: torch.Tensor) -> torch.Tensor:
        """Centers (B, N, C) and pixels (B, C, H, W) to an update (B, N, C). The mask logits play no part."""
        keys, values = (self._heads(x) for x in self.keys_and_values(query, pixels))
        attention = self.norm_logits(self._heads(self.query(query)) @ keys.transpose(-1, -2)).softmax(dim=-1)
        retrieved = (attention @ values).transpose(1, 2).flatten(2)
        return self.projection(norm_vectors(self.norm, retrieved))


@CROSS_ATTENTION_REGISTRY.register()
class SharedSoftmaxCrossAttention(SoftmaxCrossAttention):
    """MaX-DeepLab's form: one softmax over all pixels and all centers (MaX-DeepLab, Eq. 5).

    Arguments as for :class:`SoftmaxCrossAttention`.
    """

    def __init__(self, channels: int, *, key_channels: int, num_heads: int, norm: str):
        super().__init__(channels, key_channels=key_channels, num_heads=num_heads, norm=norm)
        self.center_key = LinearBN(channels, key_channels, norm=norm, init_std=channels**-0.5)
        self.center_value = LinearBN(channels, channels, norm=norm, init_std=channels**-0.5)

    def keys_and_values(self, query: torch.Tensor, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of the pixels, then of the N centers: M = H · W + N."""
        keys, values = super().keys_and_values(query, pixels)
        return torch.cat([keys, self.center_key(query)], 1), torch.cat([values, self.center_value(query)], 1)


@CROSS_ATTENTION_REGISTRY.register()
class GumbelCrossAttention(KMeansCrossAttention):
    """The ablation's Gumbel-softmax: assignments are sampled in training, and gradients pass through them.

    A pixel's one-hot assignment is drawn with the softmax probabilities of its logits; its gradient is that of the
    relaxed sample (straight-through, https://arxiv.org/abs/1611.01144). At test it is k-means.
    """

    def cluster_sums(self, mask_logits: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """(B, N, H, W) logits and (B, C, H, W) values to sums (B, N, C), of sampled assignments in training."""
        if not self.training:
            return super().cluster_sums(mask_logits, values)
        assignment = F.gumbel_softmax(mask_logits.flatten(2), hard=True, dim=1)
        return assignment @ flatten_pixels(values)
