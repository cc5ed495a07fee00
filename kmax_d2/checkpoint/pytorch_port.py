"""Maps the public PyTorch re-implementation's state dicts to our names and layouts by rule."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..errors import UserError
from ..modeling.backbones import KMaXResNet
from ..modeling.residual import Bottleneck
from .rules import COMMON, PLAIN_WORDS, Rule, rename

# Applied in order; each names one part of the model.
_RULES: list[Rule] = [
    *PLAIN_WORDS,
    (r"^sem_seg_head\.predictor\.auxiliary_semantic_predictor\.", "semantic_head."),
    (r"^sem_seg_head\.predictor\.", "transformer_decoder."),
    (r"^sem_seg_head\.pixel_decoder\.", "pixel_decoder."),
    # There, a norm is a child of its convolution.
    (r"^(backbone\.(stem|res).*)\.weight$", r"\1.conv.weight"),
    (r"\.norm\.conv\.weight$", ".norm.weight"),
    (r"^backbone\.stem\.conv1", "backbone.stem"),
    (r"^backbone\.res", "backbone.stage"),
    (r"\.in_norms", ".input_norms"),
    (r"^(pixel_decoder\.stages\.\d)\.blocks", r"\1"),
    (r"\.resized_fuses\.(\d)\.conv_bn_low", r".fusions.\1.coarse.1"),
    (r"\.resized_fuses\.(\d)\.conv_bn_high", r".fusions.\1.fine.1"),
    (r"\.qkv_transform\.conv", ".qkv"),
    (r"\.kmax_transformer_layers", ".layers"),
    (r"\.predcitor", ".predictor"),  # spelled so in the files
    (r"\.pixel_space_head_last_convbn\.conv", ".pixel_projection"),
    (r"\.pixel_space_head_last_convbn\.norm", ".pixel_norm"),
    (r"\.pixel_space_head_conv", ".pixel_head."),
    (r"\.aspp_conv0", ".pointwise"),
    (r"\.low_level_projection", ".low_level"),
    (r"\.low_level_fusion(_os\d)_conv", r".fuse\1."),
    (r"_os8", ".0"),
    (r"_os4", ".1"),
    (r"^semantic_head\.(conv_block_)?([01])\.", r"semantic_head.head.\2."),
    (r"^semantic_head\.(final_conv|2)\.conv", "semantic_head.classifier"),
    (r"\.(pixel_head|fuse\.\d|head)\.0", r".\1.depthwise"),
    (r"\.(pixel_head|fuse\.\d|head)\.1", r".\1.pointwise"),
    *COMMON,
]


def is_port(names: Iterable[str]) -> bool:
    """Tells whether a state dict's names are those of the public PyTorch re-implementation."""
    return any(name.startswith("sem_seg_head.predictor._kmax_transformer_layers.") for name in names)


def state_dict_name(port_name: str) -> str:
    """Returns our name of an entry: "backbone.res2.0.conv1.weight" becomes "backbone.stage2.0.conv1.conv.weight"."""
    return rename(port_name, _RULES)


def port_to_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Converts the re-implementation's state dict to one of :class:`~kmax_d2.modeling.KMaXDeepLab`.

    Both list the classes in contiguous order with void last. `num_batches_tracked` is left out: batch norms with a
    fixed momentum do not read it. The tensors are views, not copies.
    """
    result = {}
    for port_name, tensor in state_dict.items():
        if port_name.endswith(".num_batches_tracked"):
            continue
        name = state_dict_name(port_name)
        if name.endswith("_attention.qkv.weight"):  # a 1D convolution there, a 2D one here
            tensor = tensor[..., None]
        elif tensor.ndim == 3:  # a 1D convolution there, a linear layer here
            tensor = tensor[..., 0]
        elif name.endswith(".centers"):
            tensor = tensor.T
        result[name] = tensor
    return result


def check_port_options(model: Any) -> None:
    """Checks that a model's options fit the re-implementation's weights.

    Its network differs from the official one in these points, and the shapes of the weights do not show all of them.

    Raises UserError with the options to set where a :class:`~kmax_d2.modeling.KMaXDeepLab` has others.
    """
    wrong = []
    blocks = [module for module in model.pixel_decoder.modules() if isinstance(module, Bottleneck)]
    if any(block.conv2.conv.dilation != (1, 1) for block in blocks):
        wrong.append("MODEL.KMAX.PIXEL_DECODER.DILATION 1")
    if isinstance(model.backbone, KMaXResNet):
        if not model.backbone.standard:
            wrong.append("MODEL.KMAX.RESNET.STANDARD True")
        in_features = model.pixel_decoder.in_features
        fitting = [name for name in in_features if name not in ("stage1", "stage2")] + ["stage1", "stage2"]
        if "stage1" in in_features and in_features != fitting:
            wrong.append(f'MODEL.KMAX.PIXEL_DECODER.IN_FEATURES "{fitting}"')
    if wrong:
        raise UserError(f"the public PyTorch port's weights need other options of this config: set {', '.join(wrong)}")
