"""The model and its parts; importing it registers them."""

from . import backbones, cross_attention
from .kmax_decoder import TRANSFORMER_DECODER_REGISTRY, KMaXTransformerDecoder
from .kmax_deeplab import KMaXDeepLab
from .kmeans import CROSS_ATTENTION_REGISTRY
from .pixel_decoder import PIXEL_DECODER_REGISTRY, KMaXPixelDecoder
from .semantic_head import SEMANTIC_HEAD_REGISTRY

__all__ = [
    "CROSS_ATTENTION_REGISTRY",
    "PIXEL_DECODER_REGISTRY",
    "SEMANTIC_HEAD_REGISTRY",
    "TRANSFORMER_DECODER_REGISTRY",
    "KMaXDeepLab",
    "KMaXPixelDecoder",
    "KMaXTransformerDecoder",
    "backbones",
    "cross_attention",
]
