"""MaX-S: a ResNet-50 with axial attention where the maps are coarse (MaX-DeepLab, CVPR 2021)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import nn

from ...errors import UserError
from ..build import keyword_arguments
from ..layers import ConvBN
from .resnet import ResidualBackbone

AXIAL_STRIDE = 16  # blocks whose input has this stride or a coarser one attend along the axes


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
