"""Reads weights: Detectron2's own and those of other implementations."""

from .checkpointer import KMaXCheckpointer, load_weights, newest_checkpoint
from .deeplab2 import deeplab2_to_state_dict

__all__ = ["KMaXCheckpointer", "deeplab2_to_state_dict", "load_weights", "newest_checkpoint"]
