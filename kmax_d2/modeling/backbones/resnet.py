"""ResNet as kMaX-DeepLab trains it: no max pool, a strided first block in every stage, raw outputs.

Its standard form, that of torchvision, timm and Detectron2, is an option: the same weights fit both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from torch import nn

from ..bottleneck import Bottleneck
from ..layers import ConvBN


@BACKBONE_REGISTRY.register()
class KMaXResNet(Backbone):
    """Pixel encoder. Its maps are the residual sums before the activation: stage1 (stem, OS 2), stage2..5 (OS 4..32).

    In the standard form stage1 comes after the max pool (OS 4), stage 2 does not stride, and all maps are activated.

    Args:
        blocks: bottlenecks in stages 2 to 5; (3, 4, 6, 3) is ResNet-50.
        widths: base width of each of these stages; its output has four times as many channels.
        stem_width: channels of the 7×7 stem.
        standard: whether to take the standard form.
        norm: name of the batch norm.
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
        self.pool = nn.Sequential(self.act_layer(), nn.MaxPool2d(3, 2, padding=1)) if standard else nn.Identity()
        # The blocks activate their input, where an activation already made changes nothing.
        self.out_act = self.act_layer() if standard else nn.Identity()
        self._out_features = ["stage1", "stage2", "stage3", "stage4", "stage5"]
        self._out_feature_channels = {"stage1": stem_width}
        self._out_feature_strides = {"stage1": 4 if standard else 2}
        channels = stem_width
        for index, (depth, width) in enumerate(zip(blocks, widths, strict=True)):
            stage = nn.Sequential()
            for block in range(depth):
                stride = 2 if block == 0 and not (standard and index == 0) else 1
                stage.append(Bottleneck(channels, width, norm=norm, stride=stride, act_layer=self.act_layer))
                if block > 0:  # nobody else reads the sum between two blocks
                    stage[-1].act = self.act_layer(inplace=True)
                channels = width * Bottleneck.expansion
            name = f"stage{index + 2}"
            self.add_module(name, stage)
            self._out_feature_channels[name] = channels
            self._out_feature_strides[name] = 2 ** (index + 2)

    @classmethod
    def from_config(cls, cfg, input_shape: ShapeSpec) -> dict:
        resnet = cfg.MODEL.KMAX.RESNET
        return {
            "blocks": resnet.BLOCKS,
            "widths": resnet.WIDTHS,
            "stem_width": resnet.STEM_WIDTH,
            "standard": resnet.STANDARD,
            "norm": cfg.MODEL.KMAX.NORM,
        }

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, 3, H, W), scaled to ±1, to the maps by name, each (B, C, H / stride, W / stride)."""
        x = self.pool(self.stem(x))
        maps = {"stage1": x}
        for name in ("stage2", "stage3", "stage4", "stage5"):
            x = maps[name] = self.out_act(getattr(self, name)(x))
        return maps
