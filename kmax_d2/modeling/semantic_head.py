"""The auxiliary semantic heads, used in training only."""

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import NaiveSyncBatchNorm, ShapeSpec
from detectron2.utils import comm
from detectron2.utils.registry import Registry
from timm.layers import trunc_normal_tf_
from torch import nn

from .build import find_map, keyword_arguments
from .layers import ConvBN, DepthwiseSeparable, flatten_pixels, resize

SEMANTIC_HEAD_REGISTRY = Registry("SEMANTIC_HEAD")
SEMANTIC_HEAD_REGISTRY.__doc__ = """
Auxiliary semantic heads, named by `MODEL.KMAX.SEMANTIC_HEAD.NAME`. Each is called with `(cfg, input_shape, act_layer)`:
the shapes of the backbone's raw maps by name, and the backbone's own activation. Its forward pass takes the dict of
these maps and returns semantic logits (B, K or K + 1, h, w), void last if it has a channel.
"""


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
        pooled = self.pool.conv(flatten_pixels(x).mean(1)[..., None, None])
        norm = self.pool.norm
        replicas = comm.get_world_size() if isinstance(norm, (nn.SyncBatchNorm, NaiveSyncBatchNorm)) else 1
        if self.training and pooled.shape[0] * replicas == 1:
            # A single value has no variance, so the running statistics normalize it.
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


def classifier(channels: int, num_logits: int) -> nn.Conv2d:
    """The last 1×1 convolution, with bias. (B, channels, H, W) to (B, num_logits, H, W)."""
    layer = nn.Conv2d(channels, num_logits, 1)
    trunc_normal_tf_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer


@SEMANTIC_HEAD_REGISTRY.register()
class ASPPSemanticHead(nn.Module):
    """Logits at the stride of stage2 by an ASPP and two fusions, as in Panoptic-DeepLab's decoder (COCO, ADE20K).

    Args:
        input_shape: shape of each encoder map by name; those of stride 4, 8, and 32 are read (stage2, stage3, stage5).
        num_classes: K; the output has K + 1 channels, void last.
        act_layer: the encoder's own activation, applied to its raw stage2 and stage3.
        channels, low_level_channels: of the ASPP and the fused maps, and that stage3 and stage2 are projected to.
    """

    @configurable
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
        self.coarse, *self.fine = (find_map(name, input_shape) for name in ("stage5", "stage3", "stage2"))
        self.aspp = ASPP(input_shape[self.coarse].channels, channels, rates=aspp_rates, dropout=dropout, norm=norm)
        self.low_level = nn.ModuleList(
            ConvBN(input_shape[name].channels, width, norm=norm, act_layer=nn.GELU)
            for name, width in zip(self.fine, low_level_channels, strict=True)
        )
        self.fuse = nn.ModuleList(
            DepthwiseSeparable(channels + width, channels, norm=norm) for width in low_level_channels
        )
        self.head = DepthwiseSeparable(channels, channels, norm=norm)
        self.classifier = classifier(channels, num_classes + 1)

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec], act_layer: type[nn.Module]) -> dict:
        """Reads the constructor's arguments from a config."""
        kmax = cfg.MODEL.KMAX
        options = keyword_arguments(kmax.SEMANTIC_HEAD) | {"num_classes": kmax.NUM_CLASSES, "norm": kmax.NORM}
        return options | {"input_shape": input_shape, "act_layer": act_layer}

    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """The encoder's maps by name to logits (B, K + 1, H / 4, W / 4)."""
        x = self.aspp(features[self.coarse])
        for name, low_level, fuse in zip(self.fine, self.low_level, self.fuse, strict=True):
            low = low_level(self.act(features[name]))
            x = fuse(torch.cat([resize(x, low.shape[-2:]), low], dim=1))
        return self.classifier(self.head(x))


@SEMANTIC_HEAD_REGISTRY.register()
class PointwiseSemanticHead(nn.Module):
    """Logits at the stride of stage5, from that map alone (Cityscapes). They have K channels, none for void."""

    @configurable
    def __init__(self, input_shape: dict[str, ShapeSpec], num_classes: int, *, norm: str, channels: int = 256):
        super().__init__()
        self.coarse = find_map("stage5", input_shape)
        self.head = DepthwiseSeparable(input_shape[self.coarse].channels, channels, norm=norm)
        self.classifier = classifier(channels, num_classes)

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec], act_layer: type[nn.Module]) -> dict:
        """Reads the constructor's arguments from a config."""
        kmax = cfg.MODEL.KMAX
        options = {"num_classes": kmax.NUM_CLASSES, "norm": kmax.NORM, "channels": kmax.SEMANTIC_HEAD.CHANNELS}
        return options | {"input_shape": input_shape}

    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """The encoder's maps by name to logits (B, K, H / 32, W / 32)."""
        return self.classifier(self.head(features[self.coarse]))
