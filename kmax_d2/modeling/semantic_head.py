"""The auxiliary semantic head, read in training only: an ASPP and two fusions, as in Panoptic-DeepLab's decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.layers import NaiveSyncBatchNorm, ShapeSpec
from detectron2.utils import comm
from torch import nn

from .layers import ConvBN, DepthwiseSeparable, resize, truncated_normal_


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: 1×1, three atrous 3×3 and image pooling, projected to one map (DeepLabv3)."""

    def __init__(self, in_channels: int, channels: int, *, rates: tuple[int, ...], dropout: float, norm: str):
        super().__init__()
        self.pointwise = ConvBN(in_channels, channels, norm=norm, act_layer=nn.GELU)
        self.atrous = nn.ModuleList(
            ConvBN(in_channels, channels, 3, norm=norm, dilation=rate, act_layer=nn.GELU) for rate in rates
        )
        self.pool = ConvBN(in_channels, channels, norm=norm, act_layer=nn.GELU)
        self.projection = ConvBN((2 + len(rates)) * channels, channels, norm=norm, act_layer=nn.GELU)
        self.dropout = nn.Dropout(dropout)

    def _pooled(self, x: torch.Tensor) -> torch.Tensor:
        pooled = self.pool.conv(x.mean(dim=(2, 3), keepdim=True))
        norm = self.pool.norm
        replicas = comm.get_world_size() if isinstance(norm, (nn.SyncBatchNorm, NaiveSyncBatchNorm)) else 1
        if self.training and pooled.shape[0] * replicas == 1:
            # One value has no variance to normalise by: the running statistics serve instead.
            pooled = F.batch_norm(
                pooled, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=norm.eps
            )
        else:
            pooled = norm(pooled)
        return self.pool.act(pooled)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, channels, H, W)."""
        branches = [self.pointwise(x)] + [branch(x) for branch in self.atrous]
        branches.append(self._pooled(x).expand_as(branches[0]))
        return self.dropout(self.projection(torch.cat(branches, dim=1)))


class SemanticHead(nn.Module):
    """Semantic logits at the stride of stage2 from the encoder's raw maps.

    Args:
        input_shape: shape of each encoder map by name; stage2, stage3 and stage5 are read.
        num_classes: K; the output has K + 1 channels, void last.
        act_layer: the encoder's own activation, applied to its raw stage2 and stage3.
        channels: channels of the ASPP and of the fused maps.
        low_level_channels: channels that stage3 and stage2 are projected to.
        norm: name of the batch norm.
    """

    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        num_classes: int,
        *,
        norm: str,
        act_layer: type[nn.Module] = nn.ReLU,
        channels: int = 256,
        low_level_channels: tuple[int, int] = (64, 32),
        aspp_rates: tuple[int, ...] = (6, 12, 18),
        dropout: float = 0.1,
    ):
        super().__init__()
        self.act = act_layer()
        self.aspp = ASPP(input_shape["stage5"].channels, channels, rates=aspp_rates, dropout=dropout, norm=norm)
        self.low_level = nn.ModuleList(
            ConvBN(input_shape[name].channels, width, norm=norm, act_layer=nn.GELU)
            for name, width in zip(("stage3", "stage2"), low_level_channels, strict=True)
        )
        self.fuse = nn.ModuleList(
            DepthwiseSeparable(channels + width, channels, norm=norm) for width in low_level_channels
        )
        self.head = DepthwiseSeparable(channels, channels, norm=norm)
        self.classifier = nn.Conv2d(channels, num_classes + 1, 1)
        truncated_normal_(self.classifier.weight, 0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """The encoder's maps by name to logits (B, K + 1, H / 4, W / 4)."""
        x = self.aspp(features["stage5"])
        for name, low_level, fuse in zip(("stage3", "stage2"), self.low_level, self.fuse, strict=True):
            low = low_level(self.act(features[name]))
            x = fuse(torch.cat([resize(x, low.shape[-2:]), low], dim=1))
        return self.classifier(self.head(x))
