"""ResNet as kMaX-DeepLab trains it: no max pool, a strided first block in every stage, raw outputs.

Its standard form, that of torchvision, timm and Detectron2, is an option: the same weights fit both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import nn

from ..build import keyword_arguments
from ..layers import ConvBN
from .residual import STAGES, ResidualBackbone


@BACKBONE_REGISTRY.register()
class KMaXResNet(ResidualBackbone):
    """ResNet of any depth and width (https://arxiv.org/abs/1512.03385).

    In the standard form stage1 comes after the max pool (OS 4), stage 2 does not stride, and all maps are activated.

    Args:
        blocks, widths: of stages 2 to 5 the bottlenecks and the base width; outputs have four times as many channels.
        stem_width: channels of the 7×7 stem.
        standard: whether to take the standard form.
    """

    act_layer = nn.ReLU

    @configurable
    def __init__(
        self,
        *,
        blocks: Sequence[int] = (3, 4, 6, 3),
        widths: Sequence[int] = (64, 128, 256, 512),
        stem_width: int = 64,
        standard: bool = False,
        norm: str = "SyncBN",
    ):
        super().__init__()
        self.standard = standard
        self.stem = ConvBN(3, stem_width, 7, norm=norm, stride=2)
        self.add_stages(stem_width, 4 if standard else 2, blocks, widths, norm=norm, first_stride=1 if standard else 2)

    @classmethod
    def from_config(cls, cfg, input_shape: ShapeSpec) -> dict:
        """Reads the constructor's arguments from a config."""
        return keyword_arguments(cfg.MODEL.KMAX.RESNET) | {"norm": cfg.MODEL.KMAX.NORM}

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, 3, H, W), scaled to ±1, to the maps by name, each (B, C, ceil(H / stride), ceil(W / stride))."""
        if not self.standard:
            return super().forward(x)
        x = nn.functional.max_pool2d(self.stem(x).relu(), 3, 2, padding=1)
        maps = {"stage1": x}
        for name in STAGES:
            # The next block activates its input again, which changes nothing.
            x = maps[name] = getattr(self, name)(x).relu()
        return maps
