"""What the ablation puts in the place of k-means: the original cross-attention, in two forms."""

from __future__ import annotations

import torch
from detectron2.utils.registry import Registry
from torch import nn

from .layers import ConvBN, LinearBN, batch_norm, norm_vectors, places, truncated_normal_

CROSS_ATTENTION_REGISTRY = Registry("CROSS_ATTENTION")
CROSS_ATTENTION_REGISTRY.__doc__ = """
Updates of the centers from the pixels, named by `MODEL.KMAX.TRANSFORMER_DECODER.CROSS_ATTENTION`. One is called with
`(channels, *, key_channels, num_heads, norm)`. Its forward pass takes the projected centers (B, N, C), the projected
pixels (B, C, H, W) and the mask logits (B, N, H, W), and gives an update of the centers (B, N, C).
"""


@CROSS_ATTENTION_REGISTRY.register()
class SoftmaxCrossAttention(nn.Module):
    """The original cross-attention (Eq. 4): every center reads all pixels through a softmax over them.

    Args:
        channels: channels of centers, pixels and values.
        key_channels: channels of queries and keys over all heads.
        num_heads: number of heads.
        norm: name of the batch norm.
    """

    def __init__(self, channels: int, *, key_channels: int, num_heads: int, norm: str):
        super().__init__()
        self.num_heads = num_heads
        self.query = LinearBN(channels, key_channels, norm=norm, init_std=channels**-0.5)
        self.key = ConvBN(channels, key_channels, norm=norm)
        self.value = ConvBN(channels, channels, norm=norm)
        for layer in (self.key, self.value):
            truncated_normal_(layer.conv.weight, channels**-0.5)
        # With batch norms where others scale by 1/√d, as in the self-attention.
        self.norm_logits = batch_norm(norm, num_heads)
        self.norm = batch_norm(norm, channels)
        self.projection = LinearBN(channels, channels, norm=norm, init_gain=0.0)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, M, C) to (B, heads, M, C / heads)."""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def keys_and_values(self, query: torch.Tensor, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the centers read: keys (B, M, key_channels) and values (B, M, C) of M places."""
        return places(self.key(pixels)), places(self.value(pixels))

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
        keys, values = super().keys_and_values(query, pixels)
        return torch.cat([keys, self.center_key(query)], 1), torch.cat([values, self.center_value(query)], 1)
