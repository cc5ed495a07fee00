"""Renaming by ordered lists of regular expressions, which all converters of foreign weights share."""

import re
from collections.abc import Callable, Iterable

Rule = tuple[str, str | Callable[[re.Match], str]]  # a pattern and its replacement, as re.sub takes them


def rename(name: str, rules: Iterable[Rule]) -> str:
    """Applies every rule in order, each to the result of those before it."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def from_zero(prefix: str) -> Callable[[re.Match], str]:
    """Makes the replacement of a number that counts from 1 there and from 0 here."""
    return lambda match: f"{prefix}{int(match[1]) - 1}"


# The official network and its PyTorch re-implementation name most parts alike. First of all, words lose their marks.
PLAIN_WORDS: list[Rule] = [(r"\._", "."), (r"(_bn|_bn_act|bnact)\.", ".")]
# Then come the rules of each, and then these.
COMMON: list[Rule] = [
    (r"^backbone\.downsample_layers\.0", "backbone.stem"),
    (r"^backbone\.downsample_layers\.(\d)", r"backbone.stages.\1.downsample"),
    (r"^backbone\.stages\.(\d)\.(\d)", r"backbone.stages.\1.blocks.\2"),
    (r"\.(dw|depthwise_)conv\.", ".conv_dw."),
    (r"\.(pw|pointwise_)conv", ".mlp.fc"),
    (r"\.attention\.(height|width)_axis", r".\1_attention"),
    (r"_rpe\.embeddings(\.weight)?", "_positions"),
    (r"\.cluster_centers(\.weight)?", ".centers"),
    (r"_embedding_projection", "_projection"),
    (r"\.(memory|query)_conv1", ".center_projection"),
    (r"\.pixel_conv1", ".pixel_projection"),
    (r"\.pixel_v_conv", ".cross_attention.value"),
    (r"\.kmeans_(memory|query)_conv3", ".cross_attention.projection"),
    (r"\.kmeans_(memory|query)_batch_norm_retrieved_value", ".cross_attention.norm"),
    (r"\.(memory|query_self)_attention", ".attention"),
    (r"\.(memory|query)_qkv_conv", ".attention.qkv"),
    (r"\.(memory|query)_conv3", ".attention.projection"),
    (r"\.(memory|query)_ffn_conv1", ".ffn.expand"),
    (r"\.(memory|query)_ffn_conv2", ".ffn.project"),
    (r"\.batch_norm_qkv", ".norm_qkv"),
    (r"\.batch_norm_similarity", ".norm_logits"),
    (r"\.batch_norm_retrieved_(value|output)", ".norm_values"),
    (r"\.pixel_space_mask_batch_norm", ".mask_norm"),
    (r"\.transformer_mask_head", ".mask_embedding"),
    (r"\.transformer_class_head\.conv", ".class_head"),
    (r"\.aspp_conv([123])", from_zero(".atrous.")),
    (r"\.aspp_pool", ".pool"),
    (r"\.proj_conv", ".projection"),
    # What acts on vectors is a linear layer here; what acts on pixels stays a convolution.
    (r"((center|class|mask)_projection|mask_embedding|\.qkv|attention\.projection|ffn\.\w+)\.conv\.", r"\1.linear."),
]
