"""Backbones trained on ImageNet by others, in our names and for our input scaling.

ResNets are for the standard form of :class:`~kmax_d2.modeling.backbones.KMaXResNet` (MODEL.KMAX.RESNET.STANDARD),
ConvNeXts for :class:`~kmax_d2.modeling.backbones.KMaXConvNeXt`. Away from the zero-padded border the converted
backbone is the same function of the image as the original. Two things differ and are folded into the weights:

**The input.** Theirs is (x - mean) / std of pixels x in 0..255, ours z = (x - 127.5) / 127.5, so that theirs is
z · 127.5 / std + (127.5 - mean) / std. With w the first kernel and a sum over input channels c and positions,

    w' = w · 127.5 / std,    constant k = Σ w · (127.5 - mean) / std for each output channel,

and k goes into the bias (ConvNeXt), or is subtracted from the running mean of the norm that follows (ResNet). Where
the original took BGR, the kernel's input channels are flipped. At the border ours pads with grey, theirs with the
mean color.

**The batch norms' epsilon**, theirs ε = 1e-5, ours ε' = 1e-3: the gain becomes gain · sqrt((var + ε') / (var + ε)).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names
from huggingface_hub import hf_hub_url, try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm import list_pretrained
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import get_pretrained_cfg, is_model_pretrained

from ..errors import UserError, did_you_mean
from ..modeling.layers import BN_EPS
from .download import download

_PIXEL_MEAN = _PIXEL_STD = 127.5  # our scaling
_THEIR_EPS = 1e-5
# Caffe2's weights, MSRA's among them, take BGR minus this (here in RGB), not divided by anything.
_CAFFE2_MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)
_CAFFE2_STD = (1 / 255, 1 / 255, 1 / 255)
_WEIGHTS_FILE = "model.safetensors"  # in every repository of timm

# Names that tell a family: each has all of one row.
_CONVNEXT = ("stem.0.weight", "stages.0.blocks.0.conv_dw.weight")
_CAFFE2_RESNET = ("conv1_w", "res2_0_branch2a_w")
_MARKS = (
    _CONVNEXT,
    _CAFFE2_RESNET,
    ("conv1.weight", "layer1.0.conv1.weight"),  # torchvision, timm
    ("stem.conv1.weight", "res2.0.conv1.weight"),  # Detectron2
)

# Applied in order. What does not begin with "backbone." then is a classifier, and is left out.
_CONVNEXT_RULES = [(r"^(stem|stages)\.", r"backbone.\1.")]
_RESNET_RULES = [
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


def _has(names: Iterable[str], marks: Iterable[str]) -> bool:
    return set(marks) <= set(names)


def is_imagenet(names: Iterable[str]) -> bool:
    """Whether a state dict's names are those of a classifier whose backbone :func:`imagenet_to_state_dict` knows."""
    names = set(names)
    return any(_has(names, marks) for marks in _MARKS)


def imagenet_to_state_dict(
    state_dict: Mapping[str, torch.Tensor],
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> dict[str, torch.Tensor]:
    """Turns an ImageNet classifier's weights into those of our backbone; see the module for what is folded in.

    Knows torchvision's, timm's and Detectron2's ResNets and timm's ConvNeXt. MSRA's R-50.pkl (Caffe2's names) is a case
    of its own: its batch norms were merged into affine layers, so that there are no running statistics. They become
    mean 0 and variance 1, which is the same function in inference, but not in training, where a batch has others. Its
    network also strides in the first 1×1 convolution of a stage, where ours strides in the 3×3, so that not even the
    first function is the same. torchvision's R-50.pkl has neither trait and is the better start.

    Args:
        state_dict: tensors by name, of which :func:`is_imagenet` is true.
        mean, std: scaling of the RGB input, pixels counted from 0 to 1; not read for Caffe2's weights, which have their
            own.

    Returns:
        Tensors by our names, "backbone.…", without the classifier and the counts of batches.
    """
    is_caffe2 = _has(state_dict, _CAFFE2_RESNET)
    if is_caffe2:
        mean, std = _CAFFE2_MEAN, _CAFFE2_STD
        state_dict = dict(zip(convert_basic_c2_names(list(state_dict)), state_dict.values(), strict=True))
    is_convnext = _has(state_dict, _CONVNEXT)
    result = {}
    for name, tensor in state_dict.items():
        for pattern, replacement in _CONVNEXT_RULES if is_convnext else _RESNET_RULES:
            name = re.sub(pattern, replacement, name)
        if name.startswith("backbone.") and not name.endswith("num_batches_tracked"):
            result[name] = tensor
    if is_convnext:
        constant = _fold_input(result, "backbone.stem.0.weight", mean, std)
        result["backbone.stem.0.bias"] = result["backbone.stem.0.bias"] + constant
        return result
    if is_caffe2:
        result["backbone.stem.conv.weight"] = result["backbone.stem.conv.weight"].flip(1)
    _fold_norms(result)
    constant = _fold_input(result, "backbone.stem.conv.weight", mean, std)
    result["backbone.stem.norm.running_mean"] = result["backbone.stem.norm.running_mean"] - constant
    return result


def _fold_input(
    weights: dict[str, torch.Tensor], kernel: str, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """Scales the first kernel (C', 3, h, w) for our input, in place, and gives the constant k, (C',)."""
    mean, std = (255 * torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (mean, std))
    weight = weights[kernel].double()
    weights[kernel] = (weight * _PIXEL_STD / std).float()
    return (weight * (_PIXEL_MEAN - mean) / std).sum((1, 2, 3)).float()


def _fold_norms(weights: dict[str, torch.Tensor]) -> None:
    """Fits every batch norm to our epsilon, in place. One without running statistics is an affine layer."""
    for name in [name for name in weights if name.endswith(".norm.weight")]:
        layer, gain = name.removesuffix("weight"), weights[name]
        var = weights.get(f"{layer}running_var")
        if var is None:
            weights[f"{layer}running_mean"] = torch.zeros_like(gain)
            weights[f"{layer}running_var"] = torch.full_like(gain, 1 - BN_EPS)  # 1 with epsilon
        else:
            weights[name] = gain * ((var + BN_EPS) / (var + _THEIR_EPS)).sqrt()


def load_timm(name: str) -> dict[str, torch.Tensor]:
    """The backbone of one of timm's pretrained ResNets or ConvNeXts, in our names.

    The file is taken from Hugging Face's cache if it is there, or else downloaded once.

    Args:
        name: timm's name with its tag, such as "convnext_tiny.fb_in22k_ft_in1k_384".

    Raises:
        UserError: timm has no such weights, they cannot be had, or they are of another kind of network.
    """
    if not is_model_pretrained(name):
        raise UserError(f"timm has no pretrained weights {name}{did_you_mean(name, list_pretrained())}")
    pretrained = get_pretrained_cfg(name)
    file = try_to_load_from_cache(pretrained.hf_hub_id, _WEIGHTS_FILE)
    if not isinstance(file, str):
        try:
            file = download(hf_hub_url(pretrained.hf_hub_id, _WEIGHTS_FILE))
        except UserError as error:
            raise UserError(f'no weights timm://{name}: {error}; MODEL.WEIGHTS "" trains from scratch') from error
    try:
        state_dict = load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file} is damaged ({error}): remove it and run again to download it again") from error
    if not is_imagenet(state_dict):
        raise UserError(
            f'timm\'s {name} is neither a ResNet nor a ConvNeXt: set MODEL.WEIGHTS "" and take it by '
            "MODEL.BACKBONE.NAME KMaXTimm, MODEL.KMAX.TIMM.NAME and MODEL.KMAX.TIMM.PRETRAINED True"
        )
    return imagenet_to_state_dict(state_dict, pretrained.mean, pretrained.std)
