"""Measures time and memory of a model next to a plain ResNet-50 body, in the same run.

python -m kmax_d2.tools.benchmark {inference,training,merging} --config-file coco/r50 [--size 641 641] [NAME VALUE ...]

inference: from uint8 images to panoptic results, with batch norms folded; merging: from logits to panoptic results;
training: one step without the optimizer.

The baseline is torchvision's ResNet-50 without pooling and head, in float32, for the same size, batch, and threads: its
forward pass, or forward and backward for training. Baseline, model, and stages take turns, so that noise affects them
alike. Each stage is timed alone on the inputs that it gets in the model; axial attention is also part of its decoder.
Seconds are medians with their interquartile range. Peak memory is that of a fresh process beyond its imports, or what
PyTorch allocates on a GPU. Weights and images are random; merging gets a made-up prediction like a trained model's.
"""

import argparse
import json
from collections.abc import Callable, Sequence

from ..command_line import ConfigParser, run_program, whole

PARSER = ConfigParser(__doc__)
PARSER.add_argument("mode", choices=("inference", "training", "merging"))
PARSER.add_argument(
    "--size", nargs=2, type=whole("--size", 1, 2**15), metavar=("HEIGHT", "WIDTH"), help="of the images (default: crop)"
)
PARSER.add_argument("--batch-size", type=whole("--batch-size", 1), default=1, metavar="N", help="images (%(default)s)")
PARSER.add_argument("--device", help="cpu or cuda (default: the config's)")
PARSER.add_argument("--precision", default="float32", help="float32, tf32, or bfloat16; the baseline has float32")
PARSER.add_argument("--threads", type=whole("--threads", 1, 1024), metavar="N", help="CPU threads (default: PyTorch's)")
PARSER.add_argument(
    "--repeats", type=whole("--repeats", 1), default=5, metavar="N", help="measurements (default: %(default)s)"
)
PARSER.add_argument("--compile", nargs="?", const="default", metavar="MODE", help="same as MODEL.KMAX.COMPILE")
PARSER.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
PARSER.add_argument("--json", action="store_true", help="print a list of rows")

PARSER.parse_if_main(__name__)

import contextlib
import functools
import multiprocessing
from collections import defaultdict

import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tabulate import tabulate
from torch import nn
from torch.utils._pytree import tree_map_only
from torch.utils.benchmark import Measurement, Timer

from ..engine import ready_config
from ..engine.writers import peak_memory
from ..modeling.axial_attention import AxialAttention1D
from ..speed import compile_model, inference_model, keep_freed_memory, training_model, use_precision
from .made_up import MadeUpMerging, made_up_prediction, made_up_segments

BASELINE = "ResNet-50 body"
KEYS = ("name", "seconds", "spread", "baseline_seconds", "ratio", "peak_bytes")
PARTS = {name: name for name in ("backbone", "pixel_decoder", "semantic_head")}
PARTS |= {"transformer_decoder": "kmax_decoders", "criterion": "losses", "postprocessor.merging": "merging"}
Task = dict[str, Callable[[], object]]  # "total", and perhaps its stages


def stages_of(model: nn.Module, run: Callable[[], object], inner: bool) -> Task:
    """Returns, for each stage, a function that repeats the calls of its modules with the inputs that they get in a run.

    With `inner`, axial attention and the final predictor are stages too.
    """
    modules = dict(model.named_modules())
    names = {name: row for name, row in PARTS.items() if name in modules}
    names |= {"transformer_decoder.predictor": "final_predictor"} if inner else {}
    axial = (name for name, module in modules.items() if inner and isinstance(module, AxialAttention1D))
    names |= {name: f"{name.partition('.')[0]}.axial_attention" for name in axial}
    calls = defaultdict(list)

    def detached(x: torch.Tensor) -> torch.Tensor:
        return x.detach().requires_grad_(x.requires_grad)

    def record(stage: str) -> Callable:
        return lambda module, *inputs: calls[stage].append((module, *tree_map_only(torch.Tensor, detached, inputs)))

    with contextlib.ExitStack() as hooks:
        for name, stage in names.items():
            hooks.enter_context(modules[name].register_forward_pre_hook(record(stage), with_kwargs=True))
        run()
    return {name: functools.partial(run_all, of_stage) for name, of_stage in calls.items()}


def run_all(calls: Sequence[tuple[nn.Module, tuple, dict]]) -> None:
    """Calls modules with positional and keyword arguments."""
    for module, args, kwargs in calls:
        module(*args, **kwargs)


def in_context(run: Callable[[], object], args: argparse.Namespace, precision: str = "") -> Callable[[], object]:
    """Returns the function, to run in a precision (else that of the arguments) and, if not training, for inference."""
    run = torch.inference_mode(args.mode != "training")(run)
    return use_precision(precision or args.precision, args.device)(run)


def resnet50_body() -> nn.Module:
    """Returns the baseline: torchvision's ResNet-50 without pooling and head."""
    return nn.Sequential(*list(torchvision.models.resnet50().children())[:-2])


def build_baseline(args: argparse.Namespace, stages: bool) -> Task:
    """Returns a run of the ResNet-50 body."""
    training = args.mode == "training"
    body = resnet50_body().to(args.device).train(training)
    x = torch.randn(args.batch_size, 3, *args.size, device=args.device)
    run = (lambda: torch.autograd.grad(body(x).mean(), list(body.parameters()))) if training else (lambda: body(x))
    return {"total": in_context(run, args, "float32")}


def build_task(args: argparse.Namespace, stages: bool) -> Task:
    """Returns a run of the model in a mode and, if wanted, of its stages; "forward" is training without backward."""
    cfg = prepare(args)
    model, num_classes = build_model(cfg), cfg.MODEL.KMAX.NUM_CLASSES
    ids, classes = made_up_segments(args.size, num_classes)
    images = torch.randint(0, 256, (args.batch_size, 3, *args.size), dtype=torch.uint8)
    inputs = [{"image": image, "segment_ids": ids, "segment_classes": classes} for image in images]
    if args.mode == "merging":
        queries, stride = cfg.MODEL.KMAX.TRANSFORMER_DECODER.NUM_QUERIES, model.pixel_decoder.output_shape()[-1].stride
        map_size = ((side - 1) // stride + 1 for side in args.size)
        logits = made_up_prediction((queries, num_classes + 1), (queries, *map_size), model.device)
        return {"total": in_context(lambda: [model.merging(*logits, tuple(args.size)) for _ in images], args)}
    task: Task = {"total": lambda: [result["panoptic_seg"] for result in model(inputs)]}
    if args.mode == "training":
        model = training_model(model, cfg)
        task["forward"], weights = lambda: model(inputs), list(model.parameters())
        task["total"] = lambda: torch.autograd.grad(sum(model(inputs).values()), weights)
    else:
        model = inference_model(model, cfg)
        model.postprocessor.merging = MadeUpMerging(model.merging)
    if stages:
        inner = args.mode == "inference" and not args.compile  # inside a compiled part, there is nothing to time
        task |= stages_of(model, in_context(task["total"], args), inner)
    compile_model(model, args.compile)
    return {name: in_context(run, args) for name, run in task.items()}


def peak_bytes(build: Callable[..., Task], args: argparse.Namespace) -> int:
    """Returns the peak memory of building a task and running it once. Call it in a fresh process."""
    keep_freed_memory()
    before = peak_memory()
    torch.set_num_threads(args.threads)
    build(args, stages=False)["total"]()
    if args.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(args.device)
    return round(2**30 * (peak_memory() - before))


def prepare(args: argparse.Namespace) -> CfgNode:
    """Returns the config to measure, and fills in arguments that have their default there. Raises UserError."""
    device = ("MODEL.DEVICE", args.device) if args.device else ()
    overrides = ("MODEL.KMAX.TEST.PAD_TO_CROP", False, "MODEL.KMAX.TIMM.PRETRAINED", False, *device)
    cfg = ready_config(args.config_file, args.opts, (*overrides, "MODEL.KMAX.TEST.PRECISION", args.precision)).clone()
    args.device, args.size = cfg.MODEL.DEVICE, args.size or list(cfg.INPUT.CROP_SIZE)
    args.threads = torch.get_num_threads() if args.threads is None else args.threads
    cfg.defrost()
    args.compile, cfg.MODEL.KMAX.COMPILE = args.compile or cfg.MODEL.KMAX.COMPILE, ""  # compiled later, by build_task
    return cfg


def benchmark(args: argparse.Namespace) -> list[dict]:
    """Measures one mode: the baseline, the total, and its stages; a row has KEYS, times in seconds."""
    prepare(args)
    builders, peaks = {BASELINE: build_baseline, "total": build_task}, {}
    for name in () if args.no_memory else builders:
        with multiprocessing.get_context("forkserver").Pool(1) as fresh_process:
            peaks[name] = fresh_process.apply(peak_bytes, (builders[name], args))
    tasks = {BASELINE: build_baseline(args, stages=False)["total"]} | build_task(args, stages=True)
    timers = {name: Timer("run()", globals={"run": run}, num_threads=args.threads) for name, run in tasks.items()}
    rounds = [{name: t.blocked_autorange(min_run_time=1e-9) for name, t in timers.items()} for _ in range(args.repeats)]
    merged = {name: Measurement.merge(each[name] for each in rounds)[0] for name in timers}
    seconds = {name: measured.median for name, measured in merged.items()}
    if "forward" in seconds:
        seconds["backward"], merged["backward"] = seconds["total"] - seconds.pop("forward"), merged["total"]
    if "final_predictor" in seconds:
        seconds["kmax_decoders"] -= seconds["final_predictor"]
    base = seconds[BASELINE]
    rows = ((name, s, merged[name].iqr, base, s / base, peaks.get(name)) for name, s in seconds.items())
    return [dict(zip(KEYS, row, strict=True)) for row in rows]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command line; None takes that of the process."""
    args = PARSER.parse(argv)
    rows = benchmark(args)
    task = f"{args.config_file}, {args.mode}, {args.batch_size} × {args.size[0]}×{args.size[1]}"
    title = f"{task}, {args.precision} on {args.device}, {args.threads} threads"
    table = tabulate(rows, headers="keys", floatfmt=("", ".4f", ".4f", ".4f", ".2f", ""), tablefmt="github")
    print(json.dumps(rows, indent=2) if args.json else f"{title}\n{table}")


if __name__ == "__main__":
    run_program(main)
