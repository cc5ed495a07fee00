"""What ResNet and MaX-S share: four stages of residual blocks after a stem."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from detectron2.modeling.backbone import Backbone
from torch import nn

from ...errors import UserError
from ..axial_attention import AxialBlock
from ..residual import EXPANSION, Bottleneck

STAGES = ("stage2", "stage3", "stage4", "stage5")


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
