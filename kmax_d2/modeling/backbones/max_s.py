"""MaX-S: a ResNet-50 with axial attention where the maps are coarse (MaX-DeepLab, CVPR 2021)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from torch import nn

from ...errors import UserError
from ..axial_attention import AxialBlock
from ..bottleneck import Bottleneck
from ..layers import ConvBN

AXIAL_STRIDE = 16  # a block whose input has this stride or a coarser one attends along the axes


@BACKBONE_REGISTRY.register()
class KMaXMaXS(Backbone):
    """Pixel encoder. Its maps are the residual sums before the activation: stage1 (stem, OS 2), stage2..5 (OS 4..32).

    Args:
        blocks: blocks in stages 2 to 5; the first of each strides.
        widths: base width of each of these stages; its output has four times as many channels.
        stem_widths: channels of the stem's three 3×3 convolutions.
        drop_path: probability of dropping a block's residual branch, for each of these stages. A stage's first block
            has that of the stage before.
        norm: name of the batch norm.
    """

    act_layer = nn.GELU

    @configurable
    def __init__(
        self,
        *,
        blocks: Sequence[int] = (3, 4, 6, 3),
        widths: Sequence[int] = (64, 128, 256, 512),
        stem_widths: Sequence[int] = (64, 64, 128),
        drop_path: Sequence[float] = (0.0, 0.0, 0.15, 0.2),
        norm: str = "SyncBN",
    ):
        super().__init__()
        if not len(blocks) == len(widths) == len(drop_path) == 4 or len(stem_widths) != 3:
            raise UserError("MaX-S has four stages and a stem of three convolutions: give as many of MODEL.KMAX.MAXS")
        first, second, channels = stem_widths
        self.stem = nn.Sequential(
            OrderedDict(
                conv1=ConvBN(3, first, 3, norm=norm, stride=2, act_layer=self.act_layer),
                conv2=ConvBN(first, second, 3, norm=norm, act_layer=self.act_layer),
                conv3=ConvBN(second, channels, 3, norm=norm),
            )
        )
        stride = 2
        self._out_features = ["stage1", "stage2", "stage3", "stage4", "stage5"]
        self._out_feature_channels = {"stage1": channels}
        self._out_feature_strides = {"stage1": stride}
        rate = 0.0
        for index, (depth, width, stage_rate) in enumerate(zip(blocks, widths, drop_path, strict=True)):
            stage = nn.Sequential()
            for block in range(depth):
                block_type = AxialBlock if stride >= AXIAL_STRIDE else Bottleneck
                step = 2 if block == 0 else 1
                stage.append(
                    block_type(channels, width, norm=norm, stride=step, drop_path=rate, act_layer=self.act_layer)
                )
                channels, stride, rate = width * block_type.expansion, stride * step, stage_rate
            name = f"stage{index + 2}"
            self.add_module(name, stage)
            self._out_feature_channels[name] = channels
            self._out_feature_strides[name] = stride

    @classmethod
    def from_config(cls, cfg, input_shape: ShapeSpec) -> dict:
        max_s = cfg.MODEL.KMAX.MAXS
        return {
            "blocks": max_s.BLOCKS,
            "widths": max_s.WIDTHS,
            "stem_widths": max_s.STEM_WIDTHS,
            "drop_path": max_s.DROP_PATH,
            "norm": cfg.MODEL.KMAX.NORM,
        }

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, 3, H, W), scaled to ±1, to the maps by name, each (B, C, ceil(H / stride), ceil(W / stride))."""
        x = self.stem(x)
        maps = {"stage1": x}
        for name in ("stage2", "stage3", "stage4", "stage5"):
            x = maps[name] = getattr(self, name)(x)
        return maps
