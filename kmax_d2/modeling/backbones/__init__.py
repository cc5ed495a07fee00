"""Pixel encoders, found by `MODEL.BACKBONE.NAME` in Detectron2's registry."""

from .convnext import KMaXConvNeXt
from .resnet import KMaXMaXS, KMaXResNet
from .timm_backbone import KMaXTimm

__all__ = ["KMaXConvNeXt", "KMaXMaXS", "KMaXResNet", "KMaXTimm"]
