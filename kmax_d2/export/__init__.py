"""The model as one graph of tensor operations, for other runtimes."""

from .graph import NetworkGraph, PanopticGraph, merge

__all__ = ["NetworkGraph", "PanopticGraph", "merge"]
