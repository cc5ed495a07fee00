"""Reading weights: Detectron2's own, and those of other implementations."""

from .checkpointer import KMaXCheckpointer, load_weights
from .official import official_to_state_dict

__all__ = ["KMaXCheckpointer", "load_weights", "official_to_state_dict"]
