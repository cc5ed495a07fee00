"""Parameters and FLOPs of a model, by part, at inference: without the auxiliary semantic head.

`python -m kmax_d2.tools.analyze --config-file coco/r50 [--size HEIGHT WIDTH] [--json] [NAME VALUE ...]`

FLOPs are counted as the paper counts them (Tab. 1 and 2): one for each multiply-add of the convolutions and matrix
products, for one image, at exactly the given size. Norms, activations, resizing, softmax and merging are left out.
The paper's implementation updates the cluster centers by a product of the one-hot assignment with the pixel values.
Here that is a sum by index, which costs next to nothing, but it is counted as the product: N · H · W · C.

The default size is the paper's: 800×1200 on COCO, else the crop, which is 1025×2049 on Cityscapes. A real image is
padded to sides of 32k + 1 first: `--size 801 1217` tells what the network then computes for one of 800×1200.

Nothing is computed, only the shapes are followed, so that this takes seconds for every model.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tabulate import tabulate
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ..engine import load_config
from ..engine.setup import choose_device, prepare_datasets
from ..errors import UserError, exit_on_user_error

PAPER_COCO_SIZE = (800, 1200)
FINAL_PREDICTOR = ("class_projection", "mask_projection", "predictor")  # of the transformer decoder


def _index_add_flops(sums: Sequence[int], dim: int, index: Sequence[int], values: Sequence[int], **_) -> int:
    """The k-means update of one image, (N, C) sums of (H·W, C) values, as a matrix product; two for a multiply-add."""
    return 2 * sums[0] * values[0] * values[1]


def multiply_adds() -> FlopCounterMode:
    """A context that counts what runs inside; its total is twice the multiply-adds."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.index_add: _index_add_flops})


def paper_size(cfg: CfgNode) -> tuple[int, int]:
    """(height, width) of the input for which the paper tells FLOPs; the crop where it tells none."""
    on_coco = any(name.startswith("coco_") for name in cfg.DATASETS.TEST)
    return PAPER_COCO_SIZE if on_coco else tuple(cfg.INPUT.CROP_SIZE)


def _num_parameters(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def prepare(cfg: CfgNode, size: tuple[int, int] | None, semantic_head: bool = False) -> tuple[CfgNode, int, int]:
    """A copy of the config for a random model on the CPU, and the height and width of the network's input.

    Args:
        cfg: the config.
        size: (height, width) of the network's input; None for the paper's.
        semantic_head: keep the auxiliary head of the training, where the config has it.

    Raises:
        UserError: the config or the size makes no model's input.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    if not semantic_head:
        cfg.MODEL.KMAX.LOSS.SEMANTIC_WEIGHT = 0.0
    cfg.MODEL.KMAX.TIMM.PRETRAINED = False
    choose_device(cfg)
    if cfg.MODEL.KMAX.NUM_CLASSES == 0:
        prepare_datasets(cfg)
    height, width = size or paper_size(cfg)
    if min(height, width) < 1:
        raise UserError(f"an input of {height}×{width} pixels has no pixel")
    return cfg, height, width


def analyze(cfg: CfgNode, size: tuple[int, int] | None = None) -> dict:
    """Counts a config's model.

    Args:
        cfg: the config; it is not changed.
        size: (height, width) of the network's input; None for the paper's.

    Returns:
        "size", [height, width]; "params"; "flops", multiply-adds of one image; "parts", with params and flops of
        "backbone", "pixel_decoder", "kmax_decoders" (with the cluster centers) and "final_predictor".

    Raises:
        UserError: the options make no model, or the model does not take this size.
    """
    cfg, height, width = prepare(cfg, size)
    try:
        return {"size": [height, width], **_count(build_model(cfg).eval(), height, width)}
    except ValueError as error:
        raise UserError(str(error)) from error


def parts_of(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The modules of each part, as the paper names them; the final predictor's lie inside the kMaX decoders'."""
    decoder = model.transformer_decoder
    return {
        "backbone": [model.backbone],
        "pixel_decoder": [model.pixel_decoder],
        "kmax_decoders": [decoder],
        "final_predictor": [child for name, child in decoder.named_children() if name in FINAL_PREDICTOR],
    }


def _count(model: nn.Module, height: int, width: int) -> dict:
    decoder = model.transformer_decoder
    parts = parts_of(model)
    params = {name: _num_parameters(modules) for name, modules in parts.items()}
    flops = Counter()
    counter = multiply_adds()

    def count_into(name: str, module: nn.Module) -> None:
        def start(*_):
            flops[name] -= counter.get_total_flops() // 2

        def stop(*_):
            flops[name] += counter.get_total_flops() // 2

        module.register_forward_pre_hook(start)
        module.register_forward_hook(stop)

    for name, modules in parts.items():
        for module in modules:
            count_into(name, module)
    model.requires_grad_(False)  # the counter trips over parameters that want gradients
    with FakeTensorMode(allow_non_fake_inputs=True), counter:
        decoder(model.pixel_decoder(model.backbone(torch.zeros(1, 3, height, width))), False)
    for count in (params, flops):  # the final predictor is inside the transformer decoder
        count["kmax_decoders"] -= count["final_predictor"]
    return {
        "params": _num_parameters([model]),
        "flops": counter.get_total_flops() // 2,
        "parts": {name: {"params": params[name], "flops": flops[name]} for name in parts},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config file or name, such as coco/r50")
    parser.add_argument(
        "--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="of the network's input (the paper's)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="NAME VALUE", help="config options to change")
    args = parser.parse_args()
    result = analyze(load_config(args.config_file, args.opts), args.size)
    if args.json:
        print(json.dumps({"config": args.config_file, **result}, indent=2))
        return
    rows = [
        (name.replace("_", " "), count["params"] / 1e6, count["flops"] / 1e9)
        for name, count in [*result["parts"].items(), ("total", result)]
    ]
    height, width = result["size"]
    print(f"{args.config_file} at {height}×{width}; FLOPs are multiply-adds")
    print(tabulate(rows, headers=["part", "params (M)", "FLOPs (G)"], floatfmt=("", ".3f", ".1f"), tablefmt="github"))


if __name__ == "__main__":
    exit_on_user_error(main)
