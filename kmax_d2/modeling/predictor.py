"""The predictor: pixels and cluster centers in, a class for each center and a mask logit for each pair out."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_tf_
from torch import nn

from .layers import DepthwiseSeparable, LinearBN, batch_norm, flatten_pixels

VOID_PRIOR = 0.9


class Prediction(NamedTuple):
    """The output of one predictor.

    Attributes:
        class_logits: tensor (B, N, K + 1), void last; None where classes were not asked for.
        mask_logits: (B, N, H, W), one logit for each cluster and pixel.
        pixel_feature: (B, 128, H, W), of unit length at each pixel.
    """

    class_logits: Any
    mask_logits: torch.Tensor
    pixel_feature: torch.Tensor

    def cropped(self, height: int, width: int, padded: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Cuts the maps to the part of an image of `padded` pixels that is not padding, and names the tensors."""
        stride = (padded[1] - 1) // (self.mask_logits.shape[-1] - 1)
        real = ..., slice((height - 1) // stride + 1), slice((width - 1) // stride + 1)
        return self._asdict() | {"mask_logits": self.mask_logits[real], "pixel_feature": self.pixel_feature[real]}


class Predictor(nn.Module):
    """Mask logits are dot products of pixel features and mask embeddings, normalized as one channel.

    The class and mask embeddings, and the maps inside the pixel head, have `channels`.
    """

    def __init__(self, pixel_channels: int, channels: int, num_classes: int, *, norm: str, feature_channels: int = 128):
        super().__init__()
        self.pixel_head = DepthwiseSeparable(pixel_channels, channels, norm=norm)
        self.pixel_projection = nn.Conv2d(channels, feature_channels, 1)
        self.pixel_norm = batch_norm(norm, feature_channels)
        self.mask_embedding = LinearBN(channels, feature_channels, norm=norm)
        self.mask_norm = batch_norm(norm, 1, init_gain=0.1)
        self.class_head = nn.Linear(channels, num_classes + 1)
        for layer in (self.pixel_projection, self.class_head):
            trunc_normal_tf_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        # This constant starts void with a probability of 0.9 against all classes together.
        prior = torch.zeros(num_classes + 1)
        prior[-1] = math.log(num_classes * VOID_PRIOR / (1 - VOID_PRIOR))
        self.register_buffer("class_prior", prior, persistent=False)

    def forward(
        self,
        pixels: torch.Tensor,
        class_embedding: torch.Tensor,
        mask_embedding: torch.Tensor,
        with_classes: bool = True,
    ) -> Prediction:
        """Pixels (B, C, H, W) and two embeddings of the centers (B, N, D) to a :class:`Prediction`."""
        feature = self.pixel_norm(self.pixel_projection(self.pixel_head(pixels)))
        embedding = self.mask_embedding(mask_embedding)
        # In float32 also under autocast: an argmax over these logits assigns the pixels.
        with torch.autocast(feature.device.type, enabled=False):
            feature = F.normalize(feature.float(), dim=1, eps=1e-6)
            mask_logits = embedding.float() @ flatten_pixels(feature).transpose(1, 2)
            mask_logits = self.mask_norm(mask_logits[:, None])[:, 0].unflatten(2, feature.shape[-2:])
        class_logits = self.class_head(class_embedding) + self.class_prior if with_classes else None
        return Prediction(class_logits, mask_logits, feature)
