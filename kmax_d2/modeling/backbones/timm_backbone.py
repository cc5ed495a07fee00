"""Any timm model with feature maps, and any vision transformer, as a pixel encoder."""

import contextlib
import functools
from collections.abc import Sequence

import timm
import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from timm.layers import Format, convert_sync_batchnorm, freeze_batch_norm_2d
from timm.models import group_parameters, is_model_in_modules
from torch import nn

from ...errors import UserError, did_you_mean
from ...hugging_face import quick_hugging_face
from .vit import PATCH, ViTPyramid

STAGES = {2: "stage1", 4: "stage2", 8: "stage3", 16: "stage4", 32: "stage5"}  # by output stride
MULTIPLES = (1, 32, 64, 224, 256)  # that sides are padded to: none, patches, windows of 2, 7 or 8 positions at OS 32
VISION_TRANSFORMERS = ("vision_transformer", "eva", "deit")  # timm's files of those with one map
TRIAL_SIZE = (65, 609)  # longer than the images most models learn from, where tables of positions may end


@BACKBONE_REGISTRY.register()
class KMaXTimm(Backbone):
    """Pixel encoder. Its maps are timm's, named by output stride; a model without one at OS 2 has no stage1.

    The model gets its input scaled as its pre-trained weights expect, whether it has them or not. Models that do
    not give (side - 1) / stride + 1 positions for sides of 32k + 1, as those with patches or windows, get it padded at
    the bottom and right to a multiple that suits them, and their maps are cut. Vision transformers, such as DINOv2 and
    DINOv3, get a :class:`~kmax_d2.modeling.backbones.vit.ViTPyramid`; timm resamples patches of other sizes.

    Args:
        name: timm's name of the model, with or without a tag of weights.
        pretrained: whether to start from timm's weights, downloaded once.
        required: names of the maps that the model must have.
        norm: "SyncBN" synchronises the model's batch norms, "FrozenBN" freezes them; with any other name they stay
            timm's, of one process.

    Attributes:
        layers_above: for each parameter of a vision transformer the number of layers above its own; else None.

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
        self.net = _create(name, pretrained)
        # timm's own conversions keep the activations inside its norms.
        if norm == "SyncBN":
            self.net = convert_sync_batchnorm(self.net)
        elif norm == "FrozenBN":
            self.net = freeze_batch_norm_2d(self.net)
        self.layers_above: dict[str, int] | None = None
        if isinstance(self.net, ViTPyramid):
            vit = self.net.pyramid.net.vit
            layers = group_parameters(vit, vit.group_matcher(), reverse=True)
            self.layers_above = {f"net.pyramid.net.vit.{n}": max(layers.values()) - i for n, i in layers.items()}
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
        # (x + 1) / 2 is the image from 0 to 1, of which timm takes the mean and divides by the deviation.
        mean, std = (torch.tensor(self.net.pretrained_cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))
        self.register_buffer("scale", 0.5 / std, persistent=False)
        self.register_buffer("shift", (0.5 - mean) / std, persistent=False)
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
        outputs = self.net(x * self.scale + self.shift)
        if getattr(self.net, "output_fmt", Format.NCHW) == Format.NHWC:
            outputs = [value.permute(0, 3, 1, 2) for value in outputs]
        return {stage: outputs[index] for stage, index in self.index.items()}

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, 3, H, W), scaled to ±1, H and W of 32k + 1, to the maps by name, each (B, C, h, w).

        h = (H - 1) / stride + 1, likewise w.
        """
        if self.multiple == 1:
            return self._maps(x)
        height, width = x.shape[-2:]
        maps = self._maps(F.pad(x, (0, -width % self.multiple, 0, -height % self.multiple)))
        for stage, stride in self._out_feature_strides.items():
            maps[stage] = maps[stage][..., : (height - 1) // stride + 1, : (width - 1) // stride + 1]
        return maps


def _create(name: str, pretrained: bool) -> nn.Module:
    """Builds timm's model, which returns the list of its maps. Raises UserError if timm cannot build it."""
    if not timm.is_model(name):
        raise UserError(f"MODEL.KMAX.TIMM.NAME: timm has no model {name}{did_you_mean(name, timm.list_models())}")
    create = functools.partial(timm.create_model, name, pretrained=pretrained)
    try:
        with quick_hugging_face() if pretrained else contextlib.nullcontext():
            if is_model_in_modules(name, VISION_TRANSFORMERS):
                return ViTPyramid(create(num_classes=0, global_pool="", patch_size=PATCH, dynamic_img_size=True))
            create = functools.partial(create, features_only=True)
            try:
                return create(strict_img_size=False)  # windowed attention at any size
            except TypeError:  # no such argument
                return create()
    except OSError as error:
        raise UserError(
            f"timm's weights of {name} cannot be downloaded: set MODEL.KMAX.TIMM.PRETRAINED False, or run again where "
            f"there is a network ({' '.join(str(error).split())})"
        ) from error
    except (AttributeError, AssertionError, RuntimeError) as error:
        raise UserError(f"timm cannot make {name} with feature maps: {' '.join(str(error).split())}") from error
