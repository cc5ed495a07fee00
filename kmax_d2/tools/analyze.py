"""Counts parameters and FLOPs of a model by part, as in inference: without the auxiliary semantic head.

python -m kmax_d2.tools.analyze --config-file coco/r50 [--size HEIGHT WIDTH] [--json] [NAME VALUE ...]

FLOPs are counted as in Tables 1 and 2 of the paper: one per multiply-add of convolutions and matrix products, for one
image of exactly the given size. The update of the cluster centers, a sum by index here, counts as the paper's product
of the one-hot assignment and the pixel values: N * H * W * C.

The default size is the paper's: 800x1200 on COCO, elsewhere the crop, which is 1025x2049 on Cityscapes. In practice an
image is padded to sides of 32k + 1 first: `--size 801 1217` shows what the network computes for one of 800x1200.
"""

import json
from collections.abc import Sequence

from ..command_line import ConfigParser, run_program, whole

PARSER = ConfigParser(__doc__)
PARSER.add_argument(
    "--size",
    nargs=2,
    type=whole("--size", 1, 2**15),
    metavar=("HEIGHT", "WIDTH"),
    help="of the network's input (default: the paper's)",
)
PARSER.add_argument("--json", action="store_true", help="print JSON")

PARSER.parse_if_main(__name__)

import torch
from detectron2.modeling import build_model
from fvcore.nn import parameter_count
from tabulate import tabulate
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ..engine import ready_config
from ..errors import UserError

PAPER_COCO_SIZE = (800, 1200)
PARTS = {"backbone": "backbone", "pixel_decoder": "pixel_decoder", "kmax_decoders": "transformer_decoder"}
FINAL_PREDICTOR = ("class_projection", "mask_projection", "predictor")  # children of the transformer decoder
# The inference network, on the CPU, with random weights.
OVERRIDES = ("MODEL.DEVICE", "cpu", "MODEL.KMAX.LOSS.SEMANTIC_WEIGHT", 0.0, "MODEL.KMAX.TIMM.PRETRAINED", False)


def flop_counter() -> FlopCounterMode:
    """Returns a context that counts the FLOPs of what runs inside: twice the multiply-adds."""

    def kmeans_update(sums, dim, index, values, **_):  # shapes, (N, C) and (H*W, C), for one image
        return 2 * sums[0] * values[0] * values[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.index_add: kmeans_update})


def analyze(file: str, options: Sequence = (), size: Sequence[int] | None = None) -> dict:
    """Counts the model of a config for an input of a size (height, width); None takes the paper's.

    Returns "size", [height, width]; "params"; "flops", multiply-adds for one image; "parts", with params and flops of
    "backbone", "pixel_decoder", "kmax_decoders" (with the cluster centers), and "final_predictor". Raises UserError if
    the options do not describe a model, or the model does not accept this size.
    """
    cfg = ready_config(file, options, OVERRIDES)
    on_coco = any(name.startswith("coco_") for name in cfg.DATASETS.TEST)
    height, width = size or (PAPER_COCO_SIZE if on_coco else cfg.INPUT.CROP_SIZE)
    if min(height, width) < 1:
        raise UserError(f"the input must have at least one pixel, not {height}×{width}")
    model = build_model(cfg).eval().requires_grad_(False)
    decoder = model.transformer_decoder
    sizes = parameter_count(model)
    params = {name: sizes[part] for name, part in PARTS.items()}
    params["final_predictor"] = sum(sizes[f"transformer_decoder.{name}"] for name in FINAL_PREDICTOR)
    # Fake tensors compute shapes alone, so every model takes seconds.
    with FakeTensorMode(allow_non_fake_inputs=True), flop_counter() as counter:
        decoder(model.pixel_decoder(model.backbone(torch.zeros(1, 3, height, width))), False)
    counts = {name: sum(by_operator.values()) // 2 for name, by_operator in counter.get_flop_counts().items()}
    flops = {name: counts[type(getattr(model, part)).__name__] for name, part in PARTS.items()}
    flops["final_predictor"] = sum(counts[f"{type(decoder).__name__}.{name}"] for name in FINAL_PREDICTOR)
    for count in (params, flops):
        count["kmax_decoders"] -= count["final_predictor"]
    return {
        "size": [height, width],
        "params": sizes[""],
        "flops": counts["Global"],
        "parts": {name: {"params": params[name], "flops": flops[name]} for name in params},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command line; None takes that of the process."""
    args = PARSER.parse(argv)
    result = analyze(args.config_file, args.opts, args.size)
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
    run_program(main)
