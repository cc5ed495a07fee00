"""ResNet, and MaX-S: a ResNet-50 with axial attention where the maps are coarse (MaX-DeepLab, CVPR 2021).

ResNet is as kMaX-DeepLab trains it: no max pool, a strided first block in every stage, raw outputs. Its standard form,
that of torchvision, timm and Detectron2, is an option: the same weights fit both.
"""

import math
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
from ..build import keyword_arguments
from ..layers import ConvBN
from ..residual import EXPANSION, Bottleneck

STAGES = ("stage2", "stage3", "stage4", "stage5")
AXIAL_STRIDE = 16  # blocks whose input has this stride or a coarser one attend along the axes


class ResidualBackbone(Backbone):
    """Pixel encoder. Its maps are raw residual sums, before the activation: stage1, the stem's, and stage2 to stage5.

    Subclasses set `stem` and call :meth:`add_stages`.
    """

    act_layer: type[nn.Module]
    stem: nn.Module

    def add_stages(
        self,
        stem_channels: int,
        stem_stride: int,
        blocks: Sequence[int],
        widths: Sequence[int],
        *,
        norm: str,
        first_stride: int = 2,
        axial_stride: float = math.inf,
        drop_path: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
    ) -> None:
        """Adds stages 2 to 5, and notes the shapes of all maps. Raises UserError for options of another number.

        The first block of a stage strides by 2, or by `first_stride` in stage 2, and has the drop path rate of the
        stage before. Blocks whose input has the stride `axial_stride` or a coarser one are axial, others bottlenecks.
        """
        if not len(blocks) == len(widths) == len(drop_path) == len(STAGES):
            raise UserError(f"{type(self).__name__} has four stages: its options need a value for each of them")
        self._out_features = ["stage1", *STAGES]
        self._out_feature_channels = {"stage1": stem_channels}
        self._out_feature_strides = {"stage1": stem_stride}
        channels, stride, rate = stem_channels, stem_stride, 0.0
        for name, depth, width, stage_rate in zip(STAGES, blocks, widths, drop_path, strict=True):
            stage = nn.Sequential()
            for index in range(depth):
                step = 1 if index > 0 else first_stride if name == STAGES[0] else 2
                block = AxialBlock if stride >= axial_stride else Bottleneck
                stage.append(block(channels, width, norm=norm, stride=step, drop_path=rate, act_layer=self.act_layer))
                channels, stride, rate = EXPANSION * width, stride * step, stage_rate
            self.add_module(name, stage)
            self._out_feature_channels[name] = channels
            self._out_feature_strides[name] = stride

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, 3, H, W), scaled to ±1, to the maps by name, each (B, C, ceil(H / stride), ceil(W / stride))."""
        x = self.stem(x)
        maps = {"stage1": x}
        for name in STAGES:
            x = maps[name] = getattr(self, name)(x)
        return maps


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


@BACKBONE_REGISTRY.register()
class KMaXMaXS(ResidualBackbone):
    """MaX-S: bottlenecks at first, axial blocks from stride 16 on.

    Args:
        blocks, widths, drop_path: of stages 2 to 5 the blocks, the base width (outputs have four times as many
            channels), and the probability of dropping a residual branch. A first block has that of the stage before.
        stem_widths: channels of the stem's three 3×3 convolutions.
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
        if len(stem_widths) != 3:
            raise UserError(f"MODEL.KMAX.MAXS.STEM_WIDTHS needs three values, one a convolution, not {stem_widths}")
        first, second, third = stem_widths
        self.stem = nn.Sequential(
            OrderedDict(
                conv1=ConvBN(3, first, 3, norm=norm, stride=2, act_layer=self.act_layer),
                conv2=ConvBN(first, second, 3, norm=norm, act_layer=self.act_layer),
                conv3=ConvBN(second, third, 3, norm=norm),
            )
        )
        self.add_stages(third, 2, blocks, widths, norm=norm, axial_stride=AXIAL_STRIDE, drop_path=drop_path)

    @classmethod
    def from_config(cls, cfg, input_shape: ShapeSpec) -> dict:
        """Reads the constructor's arguments from a config."""
        return keyword_arguments(cfg.MODEL.KMAX.MAXS) | {"norm": cfg.MODEL.KMAX.NORM}
