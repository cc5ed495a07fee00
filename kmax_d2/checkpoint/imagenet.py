"""Converts backbones that others trained on ImageNet to our names, input scaling, and batch-norm epsilon.

ResNets are for the standard form of :class:`~kmax_d2.modeling.backbones.KMaXResNet` (MODEL.KMAX.RESNET.STANDARD),
ConvNeXts for :class:`~kmax_d2.modeling.backbones.KMaXConvNeXt`. Away from the zero-padded border the converted
backbone computes the same function of the image as the original. Two differences are folded into the weights:

**The input.** Theirs is (x - m) / s for pixels x in 0..255, ours z = (x - M) / S with MODEL.PIXEL_MEAN and PIXEL_STD,
so that theirs is z · S / s + (M - m) / s. With w the first kernel and a sum over input channels c and positions,

    w' = w · S / s,    constant k = Σ w · (M - m) / s for each output channel,

and k is added to the bias (ConvNeXt), or subtracted from the running mean of the norm that follows (ResNet). Where
the original took BGR, the kernel's input channels are flipped. At the border ours pads with our mean color, theirs
with theirs.

**The batch norms' epsilon**, theirs ε = 1e-5, ours ε' = 1e-3: the gain becomes gain · sqrt((var + ε') / (var + ε)).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm import list_pretrained
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import get_pretrained_cfg, is_model_pretrained

from ..errors import UserError, did_you_mean
from ..modeling.layers import BN_EPS
from .download import hub_file
from .rules import COMMON, Rule, rename

_THEIR_EPS = 1e-5
# Caffe2's weights, such as MSRA's, take BGR minus this mean (here in RGB), not divided by anything.
_CAFFE2_MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)
_CAFFE2_STD = (1 / 255, 1 / 255, 1 / 255)

# Each family's state dicts have these names.
_CONVNEXT = {"stem.0.weight", "stages.0.blocks.0.conv_dw.weight"}
_FACEBOOK_CONVNEXT = {"downsample_layers.0.0.weight", "stages.0.0.dwconv.weight"}
_CAFFE2_RESNET = {"conv1_w", "res2_0_branch2a_w"}
_TORCHVISION_RESNET = {"conv1.weight", "layer1.0.conv1.weight"}  # timm's too
_DETECTRON2_RESNET = {"stem.conv1.weight", "res2.0.conv1.weight"}
_FAMILIES = (_CONVNEXT, _FACEBOOK_CONVNEXT, _CAFFE2_RESNET, _TORCHVISION_RESNET, _DETECTRON2_RESNET)

# Applied in order. What does not begin with "backbone." afterwards is the classifier, and is left out.
_CONVNEXT_RULES: list[Rule] = [(r"^(stem|downsample_layers|stages)\.", r"backbone.\1."), *COMMON]
_RESNET_RULES: list[Rule] = [
    # torchvision and timm to Detectron2
    (r"^layer([1-4])\.", lambda match: f"res{int(match[1]) + 1}."),
    (r"^(conv1|bn1)\.", r"stem.\1."),
    (r"\bbn([123])\.", r"conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    # Detectron2 to ours
    (r"\.(conv[123]|shortcut)\.weight$", r".\1.conv.weight"),
    (r"^stem\.conv1\.(conv|norm)\.", r"backbone.stem.\1."),
    (r"^res([2-5])\.", r"backbone.stage\1."),
]


def is_imagenet(names: Iterable[str]) -> bool:
    """Tells whether a state dict's names are those of a classifier that :func:`imagenet_to_state_dict` converts."""
    return any(marks <= set(names) for marks in _FAMILIES)


def imagenet_to_state_dict(
    state_dict: Mapping[str, torch.Tensor],
    pixel_mean: torch.Tensor,
    pixel_std: torch.Tensor,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> dict[str, torch.Tensor]:
    """Converts an ImageNet classifier's weights to those of our backbone; the module says what is folded in.

    Supports the ResNets of torchvision, timm, and Detectron2, and the ConvNeXt of timm and Facebook. MSRA's R-50.pkl
    (Caffe2's names) strides in a stage's first 1×1 convolution, and has affine layers for batch norms: running
    statistics become mean 0 and variance 1, the same function in inference only. torchvision's R-50.pkl is the better
    start.

    Args:
        state_dict: tensors by name, for which :func:`is_imagenet` is true.
        pixel_mean, pixel_std: (3, 1, 1) scaling of our RGB input, with pixels in 0..255.
        mean, std: scaling of theirs, in RGB, with pixels in 0..1; Caffe2's weights ignore it and use their own.

    Returns:
        Tensors by our names, "backbone.…", without the classifier and `num_batches_tracked`.
    """
    is_caffe2 = state_dict.keys() >= _CAFFE2_RESNET
    if is_caffe2:
        mean, std = _CAFFE2_MEAN, _CAFFE2_STD
        state_dict = dict(zip(convert_basic_c2_names(list(state_dict)), state_dict.values(), strict=True))
    is_convnext = any(state_dict.keys() >= names for names in (_CONVNEXT, _FACEBOOK_CONVNEXT))
    result = {}
    for name, tensor in state_dict.items():
        name = rename(name, _CONVNEXT_RULES if is_convnext else _RESNET_RULES)
        if name.startswith("backbone.") and not name.endswith("num_batches_tracked"):
            result[name] = tensor
    kernel = "backbone.stem.0.weight" if is_convnext else "backbone.stem.conv.weight"
    their_mean, their_std = 255 * torch.tensor([mean, std], dtype=torch.float64).view(2, 3, 1, 1)
    weight = (result[kernel].flip(1) if is_caffe2 else result[kernel]).double() / their_std
    result[kernel] = (weight * pixel_std.cpu()).float()
    constant = (weight * (pixel_mean.cpu() - their_mean)).sum((1, 2, 3)).float()
    if is_convnext:
        result["backbone.stem.0.bias"] = result["backbone.stem.0.bias"] + constant
    else:
        _fold_norms(result)
        result["backbone.stem.norm.running_mean"] = result["backbone.stem.norm.running_mean"] - constant
    return result


def _fold_norms(weights: dict[str, torch.Tensor]) -> None:
    """Adapts every batch norm to our epsilon, in place. One without running statistics is an affine layer."""
    for name in [name for name in weights if name.endswith(".norm.weight")]:
        layer, gain = name.removesuffix("weight"), weights[name]
        var = weights.get(f"{layer}running_var")
        if var is None:
            weights[f"{layer}running_mean"] = torch.zeros_like(gain)
            weights[f"{layer}running_var"] = torch.full_like(gain, 1 - BN_EPS)  # 1 once epsilon is added
        else:
            weights[name] = gain * ((var + BN_EPS) / (var + _THEIR_EPS)).sqrt()


def load_timm(name: str, pixel_mean: torch.Tensor, pixel_std: torch.Tensor) -> dict[str, torch.Tensor]:
    """Reads the backbone of one of timm's pretrained ResNets or ConvNeXts, through Hugging Face's cache.

    The name has its tag, such as "convnext_tiny.fb_in22k_ft_in1k_384"; the rest is as for
    :func:`imagenet_to_state_dict`. Raises UserError where timm has no such weights, they cannot be downloaded, or are
    of another kind of network.
    """
    if not is_model_pretrained(name):
        raise UserError(f"timm has no pretrained weights {name}{did_you_mean(name, list_pretrained())}")
    pretrained: Any = get_pretrained_cfg(name)
    try:
        file = hub_file(pretrained.hf_hub_id, "model.safetensors")
    except UserError as error:
        raise UserError(f'timm://{name}: {error}; MODEL.WEIGHTS "" trains from scratch') from error
    try:
        state_dict = load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file} is damaged ({error}): remove it and run again to download it again") from error
    if not is_imagenet(state_dict):
        raise UserError(
            f'timm\'s {name} is neither a ResNet nor a ConvNeXt: set MODEL.WEIGHTS "" and use it through '
            "MODEL.BACKBONE.NAME KMaXTimm, MODEL.KMAX.TIMM.NAME and MODEL.KMAX.TIMM.PRETRAINED True"
        )
    return imagenet_to_state_dict(state_dict, pixel_mean, pixel_std, pretrained.mean, pretrained.std)
