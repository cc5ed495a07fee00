"""Any vision transformer of timm, such as DINOv2's and DINOv3's, as a pixel encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from timm.models import group_parameters
from torch import nn

from ...errors import UserError
from .timm_backbone import InputScaling, create_timm, crop_maps, pad_to_multiple

PATCH = 16
STAGES = {"p2": "stage2", "p3": "stage3", "p4": "stage4", "p5": "stage5"}


class TimmViT(Backbone):
    """The last map of a vision transformer, "last", after its final norm; parameters have timm's names."""

    def __init__(self, name: str, pretrained: bool):
        super().__init__()
        options = {"num_classes": 0, "global_pool": "", "patch_size": PATCH, "dynamic_img_size": True}
        try:
            vit = create_timm(name, pretrained, **options)
        except TypeError as error:  # no such argument
            raise UserError(f"MODEL.KMAX.TIMM.NAME {name} is no vision transformer: take KMaXTimm for it") from error
        self.scaling = InputScaling(vit.pretrained_cfg)
        self.vit = vit
        self._out_features = ["last"]
        self._out_feature_channels = {"last": vit.embed_dim}
        self._out_feature_strides = {"last": PATCH}

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, 3, H, W), scaled to ±1, H and W multiples of 16, to "last" (B, C, H / 16, W / 16)."""
        maps = self.vit.forward_intermediates(
            self.scaling(x), indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        return {"last": maps[-1]}


@BACKBONE_REGISTRY.register()
class KMaXViT(Backbone):
    """Pixel encoder: a vision transformer, and ViTDet's simple pyramid on its last map (https://arxiv.org/abs/2203.16527).

    Patches have 16 pixels; timm resamples the weights of other sizes, such as DINOv2's 14. The input is padded at the
    bottom and right to a multiple of 32, and the maps are cut.

    Args:
        name: timm's name of the model, with or without a tag of weights.
        pretrained: whether to start from timm's weights, downloaded once.
        required: names of the maps that the model must have.
        channels: of each map.

    Raises:
        UserError: timm has no such vision transformer or weights, or Detectron2 is too old.
    """

    act_layer = nn.GELU

    @configurable
    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        required: Sequence[str] = ("stage2", "stage3", "stage4", "stage5"),
        channels: int = 256,
    ):
        super().__init__()
        try:
            from detectron2.modeling.backbone.vit import SimpleFeaturePyramid
        except ImportError as error:
            raise UserError(
                "KMaXViT needs SimpleFeaturePyramid, which Detectron2's 0.6 release lacks: install its main branch"
            ) from error
        missing = set(required) - set(STAGES.values())
        if missing:
            raise UserError(f"KMaXViT has no {min(missing)} of MODEL.KMAX.PIXEL_DECODER.IN_FEATURES, only stage2 to 5")
        net = TimmViT(name, pretrained)
        self.pyramid = SimpleFeaturePyramid(net, "last", channels, scale_factors=(4.0, 2.0, 1.0, 0.5))
        self._out_features = list(STAGES.values())
        self._out_feature_channels = dict.fromkeys(self._out_features, channels)
        self._out_feature_strides = {STAGES[name]: shape.stride for name, shape in self.pyramid.output_shape().items()}
        layers = group_parameters(net.vit, net.vit.group_matcher(), reverse=True)
        # Of each pre-trained parameter, for SOLVER.LAYER_DECAY.
        self.layers_above = {f"pyramid.net.vit.{n}": max(layers.values()) - layer for n, layer in layers.items()}

    @classmethod
    def from_config(cls, cfg, input_shape: ShapeSpec) -> dict:
        """Reads the constructor's arguments from a config."""
        options = cfg.MODEL.KMAX.TIMM
        return {
            "name": options.NAME,
            "pretrained": options.PRETRAINED and not cfg.MODEL.WEIGHTS,  # a checkpoint would replace them
            "required": cfg.MODEL.KMAX.PIXEL_DECODER.IN_FEATURES,
        }

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, 3, H, W), scaled to ±1, H and W of 32k + 1, to the maps by name, each (B, C, h, w).

        h = (H - 1) / stride + 1, likewise w.
        """
        maps = {STAGES[name]: value for name, value in self.pyramid(pad_to_multiple(x, 32)).items()}
        return crop_maps(maps, self._out_feature_strides, x.shape[-2:])
