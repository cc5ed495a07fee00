"""ViTDet's simple feature pyramid (https://arxiv.org/abs/2203.16527) on a vision transformer of timm."""

import torch
from detectron2.modeling.backbone import Backbone
from timm.models import FeatureInfo
from torch import nn

from ...errors import UserError

PATCH = 16
SCALES = (4.0, 2.0, 1.0, 0.5)
CHANNELS = 256


class LastMap(Backbone):
    """A vision transformer's last map after its final norm, "last"; `vit` keeps timm's names.

    (B, 3, H, W), scaled as timm's weights expect, H and W multiples of 16, to (B, C, H / 16, W / 16).
    """

    def __init__(self, vit: nn.Module):
        super().__init__()
        self.vit = vit
        self._out_features = ["last"]
        self._out_feature_channels = {"last": vit.embed_dim}
        self._out_feature_strides = {"last": PATCH}

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """See the class."""
        maps = self.vit.forward_intermediates(x, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True)
        return {"last": maps[-1]}


class ViTPyramid(nn.Module):
    """Makes a vision transformer with patches of 16 pixels a model with maps, as timm makes its others.

    (B, 3, H, W), H and W multiples of 32, to the list of maps (B, 256, H / stride, W / stride) at strides 4 to 32.

    Raises UserError if Detectron2 is too old.
    """

    def __init__(self, vit: nn.Module):
        super().__init__()
        try:
            from detectron2.modeling.backbone.vit import SimpleFeaturePyramid
        except ImportError as error:
            raise UserError(
                "a vision transformer needs SimpleFeaturePyramid, which Detectron2's 0.6 release lacks: install its "
                "main branch"
            ) from error
        self.pyramid = SimpleFeaturePyramid(LastMap(vit), "last", CHANNELS, SCALES)
        maps = [{"num_chs": CHANNELS, "reduction": int(PATCH / scale), "module": ""} for scale in SCALES]
        self.feature_info = FeatureInfo(maps, out_indices=tuple(range(len(maps))))
        self.pretrained_cfg = vit.pretrained_cfg

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """See the class."""
        return list(self.pyramid(x).values())
