"""Pixel encoders, found by `MODEL.BACKBONE.NAME` in Detectron2's registry."""

from .resnet import KMaXResNet

__all__ = ["KMaXResNet"]
