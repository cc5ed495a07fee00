"""kMaX-DeepLab (k-means Mask Transformer, ECCV 2022) for Detectron2.

Importing this package registers its models and datasets with Detectron2. Only the project's own programs put that off
until they have parsed their command line, so that ``--help`` does not wait seconds for PyTorch.
"""

import sys

__version__ = "0.2.0"


def _parses_first() -> bool:
    """Returns whether this process runs a program that parses its command line before it imports PyTorch.

    This is true of ``python -m kmax_d2.tools.NAME`` and of scripts that set ``PARSES_FIRST = True`` before they import
    this package, such as the demo.
    """
    if sys.argv[:1] == ["-m"]:  # Python imports a module's parent packages before it runs the module
        return "kmax_d2.tools." in sys.orig_argv[-len(sys.argv)]
    return getattr(sys.modules["__main__"], "PARSES_FIRST", False)


if not _parses_first():
    from . import data, model_zoo, modeling
    from .config import add_kmax_config
    from .inference import load

__all__ = ["add_kmax_config", "data", "load", "model_zoo", "modeling"]
