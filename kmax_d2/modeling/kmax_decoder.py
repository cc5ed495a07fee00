"""The kMaX decoders: cluster centers refined by k-means cross-attention, self-attention and a feed-forward net."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.utils.registry import Registry
from timm.layers import DropPath, trunc_normal_tf_
from torch import nn

from ..errors import UserError
from .build import build_from, keyword_arguments
from .kmeans import CROSS_ATTENTION_REGISTRY
from .layers import ConvBN, LinearBN, batch_norm, norm_vectors
from .predictor import Prediction, Predictor

TRANSFORMER_DECODER_REGISTRY = Registry("TRANSFORMER_DECODER")
TRANSFORMER_DECODER_REGISTRY.__doc__ = """
Transformer decoders, named by `MODEL.KMAX.TRANSFORMER_DECODER.NAME`. Each is called with `(cfg, input_shape)`, where
`input_shape` lists the ShapeSpecs of the pixel decoder. Its forward pass takes the list of maps and whether auxiliary
predictions need class logits, and returns the final Prediction and the list of auxiliary ones.
"""


class CenterSelfAttention(nn.Module):
    """Self-attention among the centers, with batch norms in place of the usual scaling by 1/√d.

    Centers and values have `channels`, queries and keys `key_channels` over all heads.
    """

    def __init__(self, channels: int, *, key_channels: int, num_heads: int, norm: str):
        super().__init__()
        self.num_heads = num_heads
        self.split = (key_channels, key_channels, channels)
        self.qkv = LinearBN(channels, sum(self.split), norm=norm, init_std=channels**-0.5)
        self.norm_logits = batch_norm(norm, num_heads)
        self.norm_values = batch_norm(norm, channels)
        self.act = nn.GELU()
        self.projection = LinearBN(channels, channels, norm=norm, init_gain=0.0)

    def forward(self, centers: torch.Tensor) -> torch.Tensor:
        """(B, N, C) to an update of the same shape."""
        q, k, v = (
            t.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in self.qkv(centers).split(self.split, dim=2)
        )
        attention = self.norm_logits(q @ k.transpose(-1, -2)).softmax(dim=-1)
        retrieved = (attention @ v).transpose(1, 2).flatten(2)
        return self.projection(self.act(norm_vectors(self.norm_values, retrieved)))


class FeedForward(nn.Sequential):
    """Two linear maps with batch norm, GELU between them. (B, N, C) to an update of the same shape."""

    def __init__(self, channels: int, hidden_channels: int, *, norm: str):
        super().__init__()
        self.expand = LinearBN(channels, hidden_channels, norm=norm, act_layer=nn.GELU)
        self.project = LinearBN(hidden_channels, channels, norm=norm, init_gain=0.0)


class KMaXDecoderLayer(nn.Module):
    """One kMaX decoder (Fig. 2): predict, update the centers by k-means, let them attend to each other, feed forward.

    Args:
        pixel_channels, channels: channels of the pixel decoder's map that it reads, and of the centers.
        num_classes: K, without void.
        norm, cross_attention, ffn_channels, key_channels, num_heads, feature_channels, drop_path: the options of
            MODEL.KMAX.NORM and MODEL.KMAX.TRANSFORMER_DECODER.
    """

    def __init__(
        self,
        pixel_channels: int,
        channels: int,
        num_classes: int,
        *,
        norm: str,
        cross_attention: str = "KMeansCrossAttention",
        ffn_channels: int = 2048,
        key_channels: int = 128,
        num_heads: int = 8,
        feature_channels: int = 128,
        drop_path: float = 0.2,
    ):
        super().__init__()
        self.act = nn.GELU()
        self.pixel_projection = ConvBN(pixel_channels, channels, norm=norm, act_layer=nn.GELU)
        self.center_projection = LinearBN(channels, channels, norm=norm, act_layer=nn.GELU)
        self.predictor = Predictor(channels, channels, num_classes, norm=norm, feature_channels=feature_channels)
        option = "MODEL.KMAX.TRANSFORMER_DECODER.CROSS_ATTENTION"
        heads: dict[str, Any] = {"key_channels": key_channels, "num_heads": num_heads, "norm": norm}
        self.cross_attention = build_from(CROSS_ATTENTION_REGISTRY, option, cross_attention, channels, **heads)
        self.attention = CenterSelfAttention(channels, **heads)
        self.ffn = FeedForward(channels, ffn_channels, norm=norm)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, centers: torch.Tensor, pixels: torch.Tensor, with_classes: bool
    ) -> tuple[torch.Tensor, Prediction]:
        """Centers (B, N, C) and an activated map (B, pixel_channels, H, W) to new centers and a prediction."""
        pixels = self.pixel_projection(pixels)
        query = self.center_projection(centers)
        prediction = self.predictor(pixels, query, query, with_classes)
        centers = centers + self.drop_path(self.cross_attention(query, pixels, prediction.mask_logits))
        centers = self.act(centers + self.drop_path(self.attention(query)))
        centers = self.act(centers + self.drop_path(self.ffn(centers)))
        return centers, prediction


@TRANSFORMER_DECODER_REGISTRY.register()
class KMaXTransformerDecoder(nn.Module):
    """All kMaX decoders, from the coarsest map on, and the final predictor on the finest map.

    Args:
        input_shape: shapes of the pixel decoder's maps, coarse to fine.
        num_queries: N, the number of cluster centers.
        decoders: number of decoders on each of the first maps.
        training_queries: drop query, the number of centers that a training iteration draws; 0 takes all.
        num_classes, channels, feature_channels, norm, layer: the arguments of :class:`KMaXDecoderLayer`.
    """

    @configurable
    def __init__(
        self,
        input_shape: Sequence[ShapeSpec],
        *,
        num_queries: int,
        num_classes: int,
        decoders: Sequence[int] = (2, 2, 2),
        training_queries: int = 0,
        channels: int = 256,
        feature_channels: int = 128,
        norm: str = "SyncBN",
        **layer: Any,
    ):
        super().__init__()
        options = "MODEL.KMAX.TRANSFORMER_DECODER"
        if len(decoders) > len(input_shape) or sum(decoders) < 1:
            wanted = f"numbers of decoders on the {len(input_shape)} maps of the pixel decoder, one in all at least"
            raise UserError(f"{options}.DECODERS is {list(decoders)}, but must be {wanted}")
        if num_queries < 2:
            raise UserError(f"{options}.NUM_QUERIES is {num_queries}, but must be at least 2")
        if training_queries not in (0, *range(2, num_queries + 1)):
            raise UserError(f"{options}.TRAINING_QUERIES: {training_queries} of {num_queries} queries cannot be drawn")
        shared: dict[str, Any] = {"norm": norm, "feature_channels": feature_channels}
        self.training_queries = training_queries
        self.centers = nn.Parameter(trunc_normal_tf_(torch.empty(num_queries, channels)))
        self.map_of_layer = [index for index, count in enumerate(decoders) for _ in range(count)]
        self.layers = nn.ModuleList(
            KMaXDecoderLayer(input_shape[index].channels, channels, num_classes, **shared, **layer)
            for index in self.map_of_layer
        )
        self.class_projection = LinearBN(channels, channels, norm=norm, act_layer=nn.GELU)
        self.mask_projection = LinearBN(channels, channels, norm=norm, act_layer=nn.GELU)
        self.predictor = Predictor(input_shape[-1].channels, channels, num_classes, **shared)

    @classmethod
    def from_config(cls, cfg, input_shape: Sequence[ShapeSpec]) -> dict:
        """Reads the constructor's arguments from a config."""
        kmax = cfg.MODEL.KMAX
        options = keyword_arguments(kmax.TRANSFORMER_DECODER)
        return {"input_shape": input_shape, "num_classes": kmax.NUM_CLASSES, "norm": kmax.NORM} | options

    def forward(
        self, maps: Sequence[torch.Tensor], auxiliary_classes: bool = True
    ) -> tuple[Prediction, list[Prediction]]:
        """Raw maps (B, C, H, W), coarse to fine, to the final prediction and that of each decoder.

        `auxiliary_classes`: whether the latter need their class logits.
        """
        centers = self.centers
        if self.training and self.training_queries:  # drop query: matching and losses see only these
            centers = centers[torch.randperm(len(centers), device=centers.device)[: self.training_queries]]
        centers = centers.expand(maps[0].shape[0], -1, -1)
        auxiliary = []
        activated = [F.gelu(x) for x in maps[: max(self.map_of_layer) + 1]]  # once for all decoders on a map
        for layer, index in zip(self.layers, self.map_of_layer, strict=True):
            centers, prediction = layer(centers, activated[index], auxiliary_classes)
            auxiliary.append(prediction)
        final = self.predictor(maps[-1], self.class_projection(centers), self.mask_projection(centers))
        return final, auxiliary
