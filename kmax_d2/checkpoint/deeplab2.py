"""Maps the official TensorFlow variables (DeepLab2) to our names and layouts by rule."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from .rules import Rule, rename

_CLASS_BIAS = "transformer_class_head/_conv/bias"  # one value per class and one for void


def _from_zero(prefix: str) -> Callable[[re.Match], str]:
    """Makes the replacement of a number that counts from 1 there and from 0 here."""
    return lambda match: f"{prefix}{int(match[1]) - 1}"


# Applied in order to a name with dots for slashes; each names one part of the model.
_RULES: list[Rule] = [
    # Before the rule for blocks: our names leave out the transformer's only block.
    (r"^transformer_decoder\._kmax_decoder\.(\d+)\._block1_transformer\.", r"transformer_decoder.layers.\1."),
    (r"\._block(\d+)", _from_zero(".")),
    (r"^semantic_decoder\._aspp\._aspp_conv(\d+)\._conv_bn_act", _from_zero("semantic_head.aspp.atrous.")),
    (r"^semantic_decoder\._low_level_conv(\d+)", _from_zero("semantic_head.low_level.")),
    (r"^semantic_decoder\._fusion_conv(\d+)\._conv1_bn_act", _from_zero("semantic_head.fuse.")),
    (r"^(pixel_space_|transformer_(class|mask)_head)", r"transformer_decoder.predictor.\1"),
    (r"^transformer_decoder\._(class|mask)_embedding_projection", r"transformer_decoder.\1_projection"),
    (r"^transformer_decoder\.cluster_centers", "transformer_decoder.centers"),
    (r"\._auxiliary_clustering_predictor\.", ".predictor."),
    (r"_?pixel_space_head\.conv_block\._conv1_bn_act\.", "pixel_head."),
    (r"_?pixel_space_head\.final_conv", "pixel_projection"),
    (r"_?pixel_space_feature_batch_norm", "pixel_norm"),
    (r"_?pixel_space_mask_batch_norm", "mask_norm"),
    (r"_?transformer_class_head\._conv", "class_head"),
    (r"_?transformer_mask_head", "mask_embedding"),
    (r"_pixel_conv1_bn_act", "pixel_projection"),
    (r"_pixel_v_conv_bn", "cross_attention.value"),
    (r"_kmeans_memory_batch_norm_retrieved_value", "cross_attention.norm"),
    (r"_kmeans_memory_conv3_bn", "cross_attention.projection"),
    (r"_memory_conv1_bn_act", "center_projection"),
    (r"_memory_qkv_conv_bn", "attention.qkv"),
    (r"_memory_attention\._batch_norm_similarity", "attention.norm_logits"),
    (r"_memory_attention\._batch_norm_retrieved_value", "attention.norm_values"),
    (r"_memory_conv3_bn", "attention.projection"),
    (r"_memory_ffn_conv1_bn_act", "ffn.expand"),
    (r"_memory_ffn_conv2_bn", "ffn.project"),
    (r"^encoder\.downsample_layers\.0\.layer_with_weights-", "backbone.stem."),
    (r"^encoder\.downsample_layers\.(\d+)\.layer_with_weights-", r"backbone.stages.\1.downsample."),
    (r"^encoder\.stages\.(\d+)\.layer_with_weights-", r"backbone.stages.\1.blocks."),
    (r"\.depthwise_conv\.", ".conv_dw."),
    (r"\.pointwise_conv", ".mlp.fc"),
    (r"^encoder\._stem", "backbone.stem"),
    (r"^encoder\._stage", "backbone.stage"),
    (r"^pixel_decoder\._backbone_norms", "pixel_decoder.input_norms"),
    (r"^pixel_decoder\._skip_connections\.(\d+)\._resized_conv_bn1", r"pixel_decoder.fusions.\1.coarse.1"),
    (r"^pixel_decoder\._skip_connections\.(\d+)\._resized_conv_bn2", r"pixel_decoder.fusions.\1.fine.1"),
    (r"^pixel_decoder\._stages", "pixel_decoder.stages"),
    (r"\._attention\._(height|width)_axis", r".\1_attention"),
    (r"_batch_norm_qkv", "norm_qkv"),
    (r"_batch_norm_similarity", "norm_logits"),
    (r"_batch_norm_retrieved_output", "norm_values"),
    (r"_(query|key|value)_rpe\.embeddings", r"\1_positions"),
    (r"qkv_kernel", "qkv.weight"),
    (r"^semantic_decoder\._aspp\._conv_bn_act", "semantic_head.aspp.pointwise"),
    (r"^semantic_decoder\._aspp\._aspp_pool\._conv_bn_act", "semantic_head.aspp.pool"),
    (r"^semantic_decoder\._aspp\._proj_conv_bn_act", "semantic_head.aspp.projection"),
    (r"^semantic_head_without_last_layer\._conv1_bn_act", "semantic_head.head"),
    (r"^semantic_last_layer", "semantic_head.classifier"),
    (r"\._shortcut", ".shortcut"),
    (r"\._conv([123])_bn(_act)?", r".conv\1"),
    (r"\._(depthwise|pointwise)\.", r".\1."),
    (r"\._depthwise_conv\.depthwise_kernel", ".conv.weight"),
    (r"\._conv\.kernel", ".conv.weight"),
    (r"\.kernel$", ".weight"),
    (r"\._batch_norm\.", ".norm."),
    (r"\.gamma$", ".weight"),
    (r"\.beta$", ".bias"),
    (r"\.layer_scale$", ".gamma"),
    (r"\.moving_mean$", ".running_mean"),
    (r"\.moving_variance$", ".running_var"),
    # What acts on vectors is a linear layer here; what acts on pixels stays a convolution.
    (
        r"((center|class|mask)_projection|mask_embedding|\.qkv|attention\.projection|ffn\.\w+)\.conv\.",
        r"\1.linear.",
    ),
]


def state_dict_name(official_name: str) -> str:
    """Returns our name of an official variable: "encoder/_stem/_conv/kernel" becomes "backbone.stem.conv.weight"."""
    return rename(official_name.replace("/", "."), _RULES)


def _to_our_layout(kind: str, name: str, array: np.ndarray) -> np.ndarray:
    """Views an array in our layout; `kind` is the last part of the official name, `name` is ours."""
    if kind == "cluster_centers":
        return array[0]
    if kind == "depthwise_kernel":  # (height, width, channels, 1)
        return array.transpose(2, 3, 0, 1)
    if not kind.endswith("kernel"):
        # A batch norm over several axes stores its channels along all of them.
        return array if kind == "embeddings" else array.reshape(-1)
    if array.ndim == 4:  # (height, width, in, out)
        return array.transpose(3, 2, 0, 1)
    array = array.reshape(array.shape[-2:]).T
    is_convolution = name.endswith((".conv.weight", "_attention.qkv.weight"))
    return array[:, :, None, None] if is_convolution else array


def _contiguous_classes(is_thing: Sequence[bool]) -> list[int]:
    """Returns each contiguous class's row in the official class heads: things, then stuff, then void."""
    official_order = sorted(range(len(is_thing)), key=lambda index: not is_thing[index])
    return [*np.argsort(official_order), len(is_thing)]


def deeplab2_to_state_dict(
    variables: Mapping[str, np.ndarray], is_thing: Sequence[bool] | None = None
) -> dict[str, torch.Tensor]:
    """Converts some or all of the official model's variables to a state dict with our names, layouts, and class order.

    The checkpoint of a pre-trained encoder uses the same names.

    Args:
        variables: arrays by official name, such as "encoder/_stem/_conv/kernel", in TensorFlow's layout. The tensors
            are views of them, with any strides; only class heads are copied.
        is_thing: whether each of the K classes, in contiguous order, is a thing. The official class heads list things
            before stuff. None, or a length other than a head's number of classes, leaves the order as it is.
    """
    state_dict = {}
    for official_name, array in variables.items():
        name = state_dict_name(official_name)
        array = _to_our_layout(official_name.rsplit("/", 1)[-1], name, np.asarray(array))
        if ".class_head." in name and is_thing is not None and len(array) == len(is_thing) + 1:
            array = array[_contiguous_classes(is_thing)]
        if name.startswith("semantic_head.classifier.") and len(array) == len(variables[_CLASS_BIAS]):
            # Void is its first channel; its classes are in contiguous order.
            array = np.roll(array, -1, axis=0)
        state_dict[name] = torch.from_numpy(array)
    return state_dict
