"""Maps the official TensorFlow variables (DeepLab2) to our names and layouts by rule."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from .rules import COMMON, PLAIN_WORDS, Rule, from_zero, rename

CLASS_BIAS = "transformer_class_head/_conv/bias"  # one value per class and one for void


# Applied in order to a name with dots for slashes; each names one part of the model.
_RULES: list[Rule] = [
    *PLAIN_WORDS,
    (r"^encoder\.", "backbone."),
    (r"\.layer_with_weights-", "."),
    # Before the rule for blocks: our names leave out the transformer's only block.
    (r"\.kmax_decoder\.(\d)\.block1_transformer\.", r".layers.\1."),
    (r"\.block(\d+)", from_zero(".")),
    (r"\.backbone_norms", ".input_norms"),
    (r"\.skip_connections\.(\d)\.resized_conv_bn1", r".fusions.\1.coarse.1"),
    (r"\.skip_connections\.(\d)\.resized_conv_bn2", r".fusions.\1.fine.1"),
    (r"^(pixel_space_|transformer_(class|mask)_head)", r"transformer_decoder.predictor.\1"),
    (r"\.auxiliary_clustering_predictor\.", ".predictor."),
    (r"\.pixel_space_head\.conv_block\.conv1\.", ".pixel_head."),
    (r"\.pixel_space_head\.final_conv", ".pixel_projection"),
    (r"\.pixel_space_feature_batch_norm", ".pixel_norm"),
    (r"^semantic_decoder\.", "semantic_head."),
    (r"\.aspp\.conv\.", ".aspp.pointwise."),
    (r"\.(aspp_\w+)\.conv\.", r".\1."),
    (r"\.low_level_conv(\d)", from_zero(".low_level.")),
    (r"\.fusion_conv(\d)\.conv1", from_zero(".fuse.")),
    (r"^semantic_head_without_last_layer\.conv1", "semantic_head.head"),
    (r"^semantic_last_layer", "semantic_head.classifier"),
    (r"\.depthwise_conv\.depthwise_kernel", ".conv.weight"),
    (r"\.qkv_kernel", ".qkv.weight"),
    (r"\.batch_norm\.", ".norm."),
    *COMMON,
    (r"\.(kernel|gamma)$", ".weight"),
    (r"\.beta$", ".bias"),
    (r"\.layer_scale$", ".gamma"),
    (r"\.moving_mean$", ".running_mean"),
    (r"\.moving_variance$", ".running_var"),
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


def deeplab2_to_state_dict(
    variables: Mapping[str, np.ndarray], is_thing: Sequence[bool] | None = None
) -> dict[str, torch.Tensor]:
    """Converts some or all of the official model's variables to a state dict with our names, layouts, and class order.

    The checkpoint of a pre-trained encoder uses the same names.

    Args:
        variables: arrays by official name in TensorFlow's layout. The tensors are views; only class heads are copied.
        is_thing: whether each of the K classes, in contiguous order, is a thing. The official class heads list things
            before stuff. None, or a length other than a head's number of classes, leaves the order as it is.
    """
    state_dict = {}
    for official_name, array in variables.items():
        name = state_dict_name(official_name)
        array = _to_our_layout(official_name.rsplit("/", 1)[-1], name, np.asarray(array))
        if ".class_head." in name and is_thing is not None and len(array) == len(is_thing) + 1:
            official_order = sorted(range(len(is_thing)), key=lambda index: not is_thing[index])
            array = array[[*np.argsort(official_order), len(is_thing)]]  # void is last in both
        if name.startswith("semantic_head.classifier.") and len(array) == len(variables[CLASS_BIAS]):
            # Void is its first channel; its classes are in contiguous order.
            array = np.roll(array, -1, axis=0)
        state_dict[name] = torch.from_numpy(array)
    return state_dict
