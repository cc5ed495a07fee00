"""ConvNeXt (https://arxiv.org/abs/2201.03545) on timm's stages, padded so that sides of 32k + 1 keep their ends."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from timm.layers import trunc_normal_tf_
from timm.models.convnext import ConvNeXt
from torch import nn

from ...errors import UserError
from ..build import keyword_arguments


@BACKBONE_REGISTRY.register()
class KMaXConvNeXt(Backbone):
    """Pixel encoder. stage1 is the stem's normalized output and stage2 the first stage's, both OS 4; then OS 8, 16, 32.

    Parameters have timm's names, without those of its head.

    Args:
        depths, widths: blocks and channels of each of the four stages.
        drop_path: probability of dropping the last block's residual branch, linear from 0 at the first block.
    """

    act_layer = nn.GELU

    @configurable
    def __init__(
        self,
        *,
        depths: Sequence[int] = (3, 3, 9, 3),
        widths: Sequence[int] = (96, 192, 384, 768),
        drop_path: float = 0.3,
    ):
        super().__init__()
        if not len(depths) == len(widths) == 4:
            raise UserError("ConvNeXt has four stages: MODEL.KMAX.CONVNEXT.DEPTHS and WIDTHS need four values each")
        net = ConvNeXt(depths=tuple(depths), dims=tuple(widths), num_classes=0, drop_path_rate=drop_path)
        self.stem, self.stages = net.stem, net.stages
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                trunc_normal_tf_(module.weight, std=0.02)  # timm truncates at 2, a hundred standard deviations
        self._out_features = ["stage1", "stage2", "stage3", "stage4", "stage5"]
        self._out_feature_channels = dict(zip(self._out_features, [widths[0], *widths], strict=True))
        self._out_feature_strides = dict(zip(self._out_features, [4, 4, 8, 16, 32], strict=True))

    @classmethod
    def from_config(cls, cfg, input_shape: ShapeSpec) -> dict:
        """Reads the constructor's arguments from a config."""
        return keyword_arguments(cfg.MODEL.KMAX.CONVNEXT)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, 3, H, W), scaled to ±1, H and W of 32k + 1, to the maps by name, each (B, C, h, w).

        h = (H - 1) / stride + 1, likewise w.
        """
        x = self.stem(F.pad(x, (1, 2, 1, 2)))
        maps = {"stage1": x}
        for index, stage in enumerate(self.stages):
            # The first stage does not stride. Zeros come before the norm, which gives them its bias.
            x = maps[f"stage{index + 2}"] = stage(F.pad(x, (0, 1, 0, 1)) if index > 0 else x)
        return maps
