"""The enhanced pixel decoder: axial attention on the coarse maps, bottlenecks on the fine ones (Sec. 4.1)."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.utils.registry import Registry
from timm.layers import LayerNorm2d
from torch import nn

from .axial_attention import AxialBlock
from .build import build_from, find_map, keyword_arguments
from .layers import ConvBN, resize
from .residual import EXPANSION, Bottleneck

PIXEL_DECODER_REGISTRY = Registry("PIXEL_DECODER")
PIXEL_DECODER_REGISTRY.__doc__ = """
Pixel decoders, named by `MODEL.KMAX.PIXEL_DECODER.NAME`. Each is called with `(cfg, input_shape)`, the shapes of the
backbone's maps by name, and has `output_shape()`: the ShapeSpecs of the list of maps, coarse to fine, that its forward
pass makes of the backbone's maps by name.
"""


PIXEL_BLOCK_REGISTRY = Registry("PIXEL_BLOCK")
PIXEL_BLOCK_REGISTRY.__doc__ = """
Blocks of the pixel decoder, named in `MODEL.KMAX.PIXEL_DECODER.KINDS` and called with `(channels, width, norm=norm)`, a
"bottleneck" with `dilation` too. The forward pass turns maps of `channels` into maps of 4 · width channels.
"""
PIXEL_BLOCK_REGISTRY._do_register("axial", AxialBlock)
PIXEL_BLOCK_REGISTRY._do_register("bottleneck", Bottleneck)


class Fusion(nn.Module):
    """Adds a coarse map, resized, to a finer one. A map of another width first goes through GELU and a 1×1 ConvBN."""

    def __init__(self, coarse_channels: int, fine_channels: int, channels: int, *, norm: str):
        super().__init__()
        self.coarse = self._projection(coarse_channels, channels, norm)
        self.fine = self._projection(fine_channels, channels, norm)

    @staticmethod
    def _projection(in_channels: int, channels: int, norm: str) -> nn.Module:
        if in_channels == channels:
            return nn.Identity()
        return nn.Sequential(nn.GELU(), ConvBN(in_channels, channels, norm=norm))

    def forward(self, coarse: torch.Tensor, fine: torch.Tensor) -> torch.Tensor:
        """(B, C1, h, w) and (B, C2, H, W) to (B, channels, H, W)."""
        return resize(self.coarse(coarse), fine.shape[-2:]) + self.fine(fine)


@PIXEL_DECODER_REGISTRY.register()
class KMaXPixelDecoder(nn.Module):
    """Stages from the coarsest encoder map to the finest; each stage's output is raw and has 4 × its width channels.

    Args:
        input_shape: shape of each encoder map by name.
        in_features, widths, blocks, kinds: of each stage the map it reads, by :func:`~kmax_d2.modeling.build.find_map`,
            its base width, the number of its blocks, and their kind in PIXEL_BLOCK_REGISTRY.
        dilation: dilation of the bottlenecks' 3×3 convolutions.
    """

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        in_features: Sequence[str] = ("stage5", "stage4", "stage3", "stage2"),
        widths: Sequence[int] = (512, 256, 128, 64),
        blocks: Sequence[int] = (1, 5, 1, 1),
        kinds: Sequence[str] = ("axial", "axial", "bottleneck", "bottleneck"),
        dilation: int = 2,
        norm: str = "SyncBN",
    ):
        super().__init__()
        self.in_features = [find_map(name, input_shape) for name in in_features]
        in_channels = [input_shape[name].channels for name in self.in_features]
        strides = [input_shape[name].stride for name in self.in_features]
        self.input_norms = nn.ModuleList(LayerNorm2d(channels, eps=1e-6) for channels in in_channels)
        self.stages = nn.ModuleList()
        self.fusions = nn.ModuleList()
        self._output_shape = []
        channels = in_channels[0]
        for index, (width, depth, kind) in enumerate(zip(widths, blocks, kinds, strict=True)):
            if index > 0:
                self.fusions.append(Fusion(channels, in_channels[index], width, norm=norm))
                channels = width
            options: dict[str, Any] = {"dilation": dilation} if kind == "bottleneck" else {}
            stage = nn.Sequential()
            for _ in range(depth):
                option = "MODEL.KMAX.PIXEL_DECODER.KINDS"
                stage.append(build_from(PIXEL_BLOCK_REGISTRY, option, kind, channels, width, norm=norm, **options))
                channels = EXPANSION * width
            self.stages.append(stage)
            self._output_shape.append(ShapeSpec(channels=channels, stride=strides[index]))

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict:
        """Reads the constructor's arguments from a config."""
        options = keyword_arguments(cfg.MODEL.KMAX.PIXEL_DECODER)
        return {"input_shape": input_shape, "norm": cfg.MODEL.KMAX.NORM} | options

    def output_shape(self) -> list[ShapeSpec]:
        """Channels and stride of each output map, coarse to fine."""
        return self._output_shape

    def forward(self, features: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """The encoder's maps by name to raw maps, coarse to fine, each (B, 4 · width, H, W)."""
        first, *finer = (norm(features[name]) for name, norm in zip(self.in_features, self.input_norms, strict=True))
        maps = [self.stages[0](first)]
        for fusion, stage, x in zip(self.fusions, self.stages[1:], finer, strict=True):
            maps.append(stage(fusion(maps[-1], x)))
        return maps
