"""The model and its parts; importing it registers them."""

from . import backbones
from .kmax_decoder import TRANSFORMER_DECODER_REGISTRY, KMaXTransformerDecoder
from .kmax_deeplab import KMaXDeepLab
from .pixel_decoder import PIXEL_DECODER_REGISTRY, KMaXPixelDecoder

__all__ = [
    "PIXEL_DECODER_REGISTRY",
    "TRANSFORMER_DECODER_REGISTRY",
    "KMaXDeepLab",
    "KMaXPixelDecoder",
    "KMaXTransformerDecoder",
    "backbones",
]
