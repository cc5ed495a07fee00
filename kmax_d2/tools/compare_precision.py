"""What inference in TF32 or bfloat16 costs in quality: a config's test sets evaluated in each precision.

`python -m kmax_d2.tools.compare_precision --config-file FILE MODEL.WEIGHTS FILE [NAME VALUE ...]`

Without a GPU, which alone knows TF32, that is emulated: the factors of every product of the network are rounded to 10
bits of mantissa, and their products summed in float32. bfloat16 is always the device's own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tabulate import tabulate
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..checkpoint import load_weights
from ..engine import Trainer, load_config
from ..engine.precision import PRECISIONS
from ..engine.setup import choose_device, prepare_datasets
from ..errors import UserError, exit_on_user_error
from ..modeling.fold import fold_batch_norms
from .quickstart import quiet_log

METRICS = {"PQ": "panoptic_seg", "AP": "segm", "mIoU": "sem_seg"}  # and the evaluator's task that gives each

# Which arguments of a product are its factors; the others are added to it.
_FACTORS = {
    torch.ops.aten.convolution: (0, 1),
    torch.ops.aten.mm: (0, 1),
    torch.ops.aten.bmm: (0, 1),
    torch.ops.aten.addmm: (1, 2),
    torch.ops.aten.baddbmm: (1, 2),
}
DROPPED_BITS = 13  # of float32's 23 bits of mantissa; TF32 has 10


def round_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """The nearest values with 10 bits of mantissa, of two as near the one whose last bit is 0.

    Infinities and NaN stay. Tensors of another type than float32 come back as they are.
    """
    if x.dtype != torch.float32:
        return x
    bits = x.view(torch.int32)
    last_kept = (bits >> DROPPED_BITS) & 1
    half = (1 << (DROPPED_BITS - 1)) - 1
    # A carry out of the mantissa raises the exponent, as it should; the sign is not touched.
    rounded = ((bits + half + last_kept) & -(1 << DROPPED_BITS)).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x)


class TF32Products(TorchDispatchMode):
    """A context in which convolutions and matrix products of float32 round their factors to TF32."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        factors = _FACTORS.get(func.overloadpacket)
        if factors is None:
            with self:  # inference mode sends whole operations, such as a linear map, to be taken apart
                parts = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if parts is NotImplemented else parts
        rounded = [round_to_tf32(arg) if index in factors else arg for index, arg in enumerate(args)]
        return func(*rounded, **kwargs)


class EmulatedTF32(nn.Module):
    """A model whose products are those of :class:`TF32Products`, on any device."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        with TF32Products():
            return self.model(batched_inputs)


def compare(cfg: CfgNode) -> dict[str, dict[str, dict[str, float]]]:
    """Evaluates a config's weights on its test sets.

    Args:
        cfg: with MODEL.WEIGHTS, datasets prepared and the device chosen.

    Returns:
        for each dataset and precision the METRICS that are on, in percent.
    """
    model = build_model(cfg).eval()
    load_weights(model, cfg.MODEL.WEIGHTS)
    model = fold_batch_norms(model)
    emulated = EmulatedTF32(model).eval()
    cfg = cfg.clone()
    cfg.defrost()
    results: dict[str, dict[str, dict[str, float]]] = {}
    for dataset in cfg.DATASETS.TEST:
        cfg.DATASETS.TEST = (dataset,)
        results[dataset] = {}
        for precision in PRECISIONS:
            cfg.MODEL.KMAX.TEST.PRECISION = precision
            evaluated = Trainer.test(cfg, emulated if precision == "tf32" and is_emulated(cfg) else model)
            results[dataset][precision] = {
                metric: evaluated[task][metric] for metric, task in METRICS.items() if task in evaluated
            }
    return results


def is_emulated(cfg: CfgNode) -> bool:
    """Whether the config's device has no TF32 of its own: GPUs have, from NVIDIA's Ampere on."""
    device = torch.device(cfg.MODEL.DEVICE)
    return device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)


def table(results: dict[str, dict[str, float]], labels: dict[str, str]) -> str:
    """One dataset's results and their differences to float32's."""
    metrics = list(results["float32"])
    rows = [
        [labels[precision], *values.values(), *(values[metric] - results["float32"][metric] for metric in metrics)]
        for precision, values in results.items()
    ]
    headers = ["precision", *metrics, *(f"{metric} − float32's" for metric in metrics)]
    formats = ("", *[".3f"] * len(metrics), *["+.3f"] * len(metrics))
    return tabulate(rows, headers=headers, floatfmt=formats, tablefmt="github")


def setup(file: str, options: list[str]) -> CfgNode:
    """The frozen config of the command line. Raises UserError where there is nothing to compare."""
    cfg = load_config(file, options)
    choose_device(cfg)
    prepare_datasets(cfg)
    if not cfg.MODEL.WEIGHTS:
        raise UserError("there is nothing to evaluate: name a checkpoint with MODEL.WEIGHTS FILE")
    if not cfg.DATASETS.TEST:
        raise UserError("there is nothing to evaluate on: name a dataset in DATASETS.TEST")
    if cfg.MODEL.KMAX.TEST.SAVE_PREDICTIONS:
        raise UserError("the precisions would overwrite each other's predictions: leave SAVE_PREDICTIONS empty")
    cfg.freeze()
    return cfg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config file or name, such as coco/r50")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="NAME VALUE", help="config options to change")
    args = parser.parse_args()
    cfg = setup(args.config_file, args.opts)
    output = Path(cfg.OUTPUT_DIR)
    output.mkdir(parents=True, exist_ok=True)
    quiet_log(output)
    labels = {precision: precision for precision in PRECISIONS}
    if is_emulated(cfg):
        labels["tf32"] = "tf32 (emulated)"
    for dataset, results in compare(cfg).items():
        print(f"{dataset}, {cfg.MODEL.WEIGHTS} on {cfg.MODEL.DEVICE}")
        print(table(results, labels))


if __name__ == "__main__":
    exit_on_user_error(main)
