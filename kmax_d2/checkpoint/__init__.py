"""Reading weights: Detectron2's own, and those of other implementations."""

from .official import official_to_state_dict

__all__ = ["official_to_state_dict"]
