"""The model and its parts; importing it registers them."""

from . import backbones, cross_attention
from .criterion import CRITERION_REGISTRY, Criterion
from .kmax_decoder import TRANSFORMER_DECODER_REGISTRY, KMaXTransformerDecoder
from .kmax_deeplab import KMaXDeepLab
from .kmeans import CROSS_ATTENTION_REGISTRY
from .merging import MERGING_REGISTRY, MaskWiseMerging
from .pixel_decoder import PIXEL_BLOCK_REGISTRY, PIXEL_DECODER_REGISTRY, KMaXPixelDecoder
from .semantic_head import SEMANTIC_HEAD_REGISTRY

__all__ = [
    "CRITERION_REGISTRY",
    "CROSS_ATTENTION_REGISTRY",
    "MERGING_REGISTRY",
    "PIXEL_BLOCK_REGISTRY",
    "PIXEL_DECODER_REGISTRY",
    "SEMANTIC_HEAD_REGISTRY",
    "TRANSFORMER_DECODER_REGISTRY",
    "Criterion",
    "KMaXDeepLab",
    "KMaXPixelDecoder",
    "KMaXTransformerDecoder",
    "MaskWiseMerging",
    "backbones",
    "cross_attention",
]
