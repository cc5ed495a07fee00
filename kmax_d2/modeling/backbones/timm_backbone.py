"""Any timm model with feature maps as a pixel encoder."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from timm.layers import Format, convert_sync_batchnorm, freeze_batch_norm_2d
from torch import nn

from ...errors import UserError, did_you_mean
from ...hugging_face import quick_hugging_face

STAGES = {2: "stage1", 4: "stage2", 8: "stage3", 16: "stage4", 32: "stage5"}  # by output stride
MULTIPLES = (1, 32, 64, 224, 256)  # that sides are padded to: none, patches, windows of 2, 7 or 8 positions at OS 32
TRIAL_SIZE = (65, 609)  # longer than the images most models learn from, where tables of positions may end


@BACKBONE_REGISTRY.register()
class KMaXTimm(Backbone):
    """Pixel encoder. Its maps are timm's, named by output stride; a model without one at OS 2 has no stage1.

    The model gets its input scaled as its pre-trained weights expect, whether it has them or not. Models that do
    not give (side - 1) / stride + 1 positions for sides of 32k + 1, as those with patches or windows, get it padded at
    the bottom and right to a multiple that suits them, and their maps are cut.

    Args:
        name: timm's name of the model, with or without a tag of weights.
        pretrained: whether to start from timm's weights, downloaded once.
        required: names of the maps that the model must have.
        norm: "SyncBN" synchronises the model's batch norms, "FrozenBN" freezes them; with any other name they stay
            timm's, of one process.

    Raises:
        UserError: if timm has no such model or weights, or the model does not give the maps at such sizes.
    """

    act_layer = nn.Identity  # the semantic head reads the maps as the model's own next stage does

    @configurable
    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        required: Sequence[str] = ("stage2", "stage3", "stage4", "stage5"),
        norm: str = "SyncBN",
    ):
        super().__init__()
        try:
            self.net = create_timm(name, pretrained, features_only=True, strict_img_size=False)  # windows at any size
        except TypeError:  # no such argument
            self.net = create_timm(name, pretrained, features_only=True)
        # timm's own conversions keep the activations inside its norms.
        if norm == "SyncBN":
            self.net = convert_sync_batchnorm(self.net)
        elif norm == "FrozenBN":
            self.net = freeze_batch_norm_2d(self.net)
        info = self.net.feature_info
        # Of several maps with one stride the last, the deepest, counts.
        self.index = {STAGES[s]: index for index, s in enumerate(info.reduction()) if s in STAGES}
        missing = [stage for stage in required if stage not in self.index]
        if missing:
            strides = ", ".join(map(str, sorted(set(info.reduction()))))
            raise UserError(
                f"timm's {name} has no maps for {', '.join(missing)} of MODEL.KMAX.PIXEL_DECODER.IN_FEATURES: stage1 "
                f"to stage5 have output strides 2, 4, 8, 16, 32, and this model's are {strides}"
            )
        self._out_features = list(self.index)
        self._out_feature_channels = {stage: info.channels()[index] for stage, index in self.index.items()}
        self._out_feature_strides = {stage: stride for stride, stage in STAGES.items() if stage in self.index}
        self.scaling = InputScaling(self.net.pretrained_cfg)
        self.multiple = self._fitting_multiple(name)

    @classmethod
    def from_config(cls, cfg, input_shape: ShapeSpec) -> dict:
        """Reads the constructor's arguments from a config."""
        options = cfg.MODEL.KMAX.TIMM
        return {
            "name": options.NAME,
            "pretrained": options.PRETRAINED and not cfg.MODEL.WEIGHTS,  # a checkpoint would replace them
            "required": cfg.MODEL.KMAX.PIXEL_DECODER.IN_FEATURES,
            "norm": cfg.MODEL.KMAX.NORM,
        }

    @torch.no_grad()
    def _fitting_multiple(self, name: str) -> int:
        """The first of MULTIPLES at which the maps of a zero image have ceil(side / stride) positions per side."""
        self.net.eval()
        for multiple in MULTIPLES:
            size = [-(-side // multiple) * multiple for side in TRIAL_SIZE]
            try:
                maps = self._maps(torch.zeros(1, 3, *size))
            except Exception as error:  # models reject sizes with different exceptions
                reason = " ".join(str(error).split()) or type(error).__name__
                continue
            strides = self._out_feature_strides
            if all(list(x.shape[-2:]) == [-(-side // strides[stage]) for side in size] for stage, x in maps.items()):
                self.net.train()
                return multiple
            reason = "its maps have other sizes than their strides tell"
        raise UserError(f"timm's {name} does not take images of 32k + 1 pixels a side: {reason}")

    def _maps(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = self.net(self.scaling(x))
        if getattr(self.net, "output_fmt", Format.NCHW) == Format.NHWC:
            outputs = [value.permute(0, 3, 1, 2) for value in outputs]
        return {stage: outputs[index] for stage, index in self.index.items()}

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, 3, H, W), scaled to ±1, H and W of 32k + 1, to the maps by name, each (B, C, h, w).

        h = (H - 1) / stride + 1, likewise w.
        """
        if self.multiple == 1:
            return self._maps(x)
        return crop_maps(self._maps(pad_to_multiple(x, self.multiple)), self._out_feature_strides, x.shape[-2:])


class InputScaling(nn.Module):
    """An image (B, 3, H, W) scaled to ±1 to what a model of timm sees; (x + 1) / 2 is the image from 0 to 1."""

    def __init__(self, pretrained_cfg: Mapping[str, Any]):
        super().__init__()
        mean, std = (torch.tensor(pretrained_cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))
        self.register_buffer("scale", 0.5 / std, persistent=False)
        self.register_buffer("shift", (0.5 - mean) / std, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) to the same shape."""
        return x * self.scale + self.shift


def pad_to_multiple(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """Pads (B, C, H, W) with zeros at the bottom and right, to sides that are multiples."""
    return F.pad(x, (0, -x.shape[-1] % multiple, 0, -x.shape[-2] % multiple))


def crop_maps(
    maps: dict[str, torch.Tensor], strides: Mapping[str, int], size: Sequence[int]
) -> dict[str, torch.Tensor]:
    """Cuts maps (B, C, h, w) to (side - 1) / stride + 1 positions for each side of an image of this size."""
    height, width = size
    return {
        name: x[..., : (height - 1) // strides[name] + 1, : (width - 1) // strides[name] + 1]
        for name, x in maps.items()
    }


def create_timm(name: str, pretrained: bool, **options: Any) -> nn.Module:
    """Builds timm's model with options of its `create_model`. Raises UserError if timm cannot build it."""
    if not timm.is_model(name):
        raise UserError(f"MODEL.KMAX.TIMM.NAME: timm has no model {name}{did_you_mean(name, timm.list_models())}")
    try:
        with quick_hugging_face() if pretrained else contextlib.nullcontext():
            return timm.create_model(name, pretrained=pretrained, **options)
    except OSError as error:
        raise UserError(
            f"timm's weights of {name} cannot be downloaded: set MODEL.KMAX.TIMM.PRETRAINED False, or run again where "
            f"there is a network ({' '.join(str(error).split())})"
        ) from error
    except (AttributeError, AssertionError, RuntimeError) as error:
        raise UserError(f"timm cannot make {name} with feature maps: {' '.join(str(error).split())}") from error
