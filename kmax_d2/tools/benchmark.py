"""Time and memory of a model beside a plain ResNet-50 body that is measured in the same run.

`python -m kmax_d2.tools.benchmark {inference,training,merging,mapper} --config-file coco/r50 --size 641 641
[--batch-size 1] [--device cpu] [--precision float32] [--threads 2] [--compile [MODE]] [--json] [--plot FILE]
[NAME VALUE ...]`

- `inference`: from uint8 images to panoptic results, merging included, with batch norms folded. The axial attention's
  time is within that of its part and has a row of its own as well.
- `training`: one step without the optimizer: forward, losses and backward.
- `merging`: from mask and class logits to panoptic results.
- `mapper`: one training sample, from files to tensors. Its yardstick is a plain mapper of Detectron2's parts: an image
  and its PNG read, resized to fit the crop and flipped, and colors turned into ids, without copy-paste.

The yardstick of the first three is torchvision's ResNet-50 without pooling and head, in float32, for the same size,
batch and threads: its forward pass, or forward and backward for training. Its repetitions and the model's take turns,
so that the noise of a busy machine meets both. Seconds are medians; the spread is the range of their middle half.
Peak memory on a CPU is that of a fresh process with model, images and one repetition, less what the process holds when
it has only imported everything; on a GPU it is what PyTorch allocated.

Weights and images are random, on which time does not depend, but for merging. A random model calls everything void, so
merging gets random predictions that look like a trained model's: a dozen confident masks, all other queries void.

`--plot` draws how inference grows with the image's side and with the number of queries. Everything grows with the
number of pixels but the axial attention, where each pixel sees its row and its column; so there is a panel of the
seconds per megapixel, with and without it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from tabulate import tabulate
from torch import nn

from ..data import MAPPER_REGISTRY, WithPasteSource, training_records
from ..data import MAPPER_REGISTRY, WithPartner, training_records
from ..data.segment_ids import rgb2id
from ..engine import load_config
from ..engine.inference import inference_model
from ..engine.precision import PRECISIONS, use_precision
from ..engine.setup import choose_device, prepare_datasets
from ..errors import UserError, exit_on_user_error
from ..modeling.axial_attention import AxialAttention1D
from ..modeling.compile import MODES as COMPILE_MODES
from ..modeling.compile import compile_model
from ..modeling.predictor import Prediction

MODES = ("inference", "training", "merging", "mapper")
SEGMENTS = 12  # masks of a made-up prediction or ground truth
SIDES = (321, 481, 641, 961, 1281, 1601, 2049)
QUERIES = (50, 100, 150, 200, 250, 300)


class Row(NamedTuple):
    """One line of the result: seconds of one repetition, and bytes; None where a stage has no peak of its own."""

    name: str
    seconds: float
    spread: float
    yardstick_seconds: float
    ratio: float
    peak_bytes: int | None


class Stopwatch:
    """Times stages without making a GPU wait: its own events are read when everything is done."""

    def __init__(self, device: str):
        self.on_gpu = device.startswith("cuda")
        self.marks: list[tuple[str, object, object]] = []

    def _now(self) -> object:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self.marks.append((name, start, self._now()))

    def timed(self, name: str, function: Callable) -> Callable:
        """The function, with its time added to a stage."""

        def run(*args, **kwargs):
            with self.stage(name):
                return function(*args, **kwargs)

        return run

    def read(self) -> dict[str, float]:
        """Seconds by stage since the last reading."""
        if self.on_gpu:
            torch.cuda.synchronize()
        seconds = defaultdict(float)
        for name, start, end in self.marks:
            seconds[name] += start.elapsed_time(end) / 1000 if self.on_gpu else end - start
        self.marks.clear()
        return seconds


def made_up_segments(size: tuple[int, int], num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An id map (H, W) of bands and columns, and the class of each of its segments."""
    rows = torch.arange(size[0])[:, None] * 3 // size[0]
    columns = torch.arange(size[1]) * (SEGMENTS // 3) // size[1]
    return rows * (SEGMENTS // 3) + columns, torch.arange(SEGMENTS) * 7 % num_classes


@functools.cache
def made_up_prediction(
    class_shape: torch.Size, mask_shape: torch.Size, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Class logits (B, N, K + 1) and mask logits (B, N, h, w) of confident masks and of queries that say void."""
    num_queries, num_classes = class_shape[1], class_shape[2] - 1
    ids, classes = made_up_segments(mask_shape[2:], num_classes)
    query = torch.randperm(num_queries)[:SEGMENTS]  # fewer where there are fewer queries
    class_logits = torch.randn(class_shape)
    class_logits[..., -1] += 10
    class_logits[:, query, classes[: len(query)]] += 20
    mask_logits = torch.randn(mask_shape)
    mask_logits[:, query] += 12 * (ids == torch.arange(len(query))[:, None, None])
    return class_logits.to(device), mask_logits.to(device)


def build_yardstick(cfg: CfgNode, args: argparse.Namespace, watch: Stopwatch) -> Callable[[], object]:
    """One repetition of the ResNet-50 body."""
    training = args.mode == "training"
    body = nn.Sequential(*list(torchvision.models.resnet50().children())[:-2]).to(args.device).train(training)
    x = torch.randn(args.batch_size, 3, *args.size, device=args.device)

    def run() -> None:
        with use_precision("float32", args.device), torch.inference_mode(not training):
            out = body(x)
            if training:
                body.zero_grad()
                out.mean().backward()

    return run


class Timed(nn.Module):
    """A part of the model, compiled or not, as a stage of a watch."""

    def __init__(self, part: nn.Module, stage: str, watch: Stopwatch):
        super().__init__()
        self.part, self.stage, self.watch = part, stage, watch

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.part, name)

    def forward(self, *args, **kwargs) -> object:
        with self.watch.stage(self.stage):
            return self.part(*args, **kwargs)


def _time_parts(model: nn.Module, stages: dict[str, str], watch: Stopwatch) -> None:
    """Makes parts of the model, inner ones first, stages of the watch by these names."""
    for name, stage in stages.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, Timed(model.get_submodule(name), stage, watch))


def build_inference(cfg: CfgNode, args: argparse.Namespace, watch: Stopwatch) -> Callable[[], object]:
    """One repetition: a batch of images to panoptic results."""
    model = inference_model(build_model(cfg).eval(), cfg)
    stages = {name: name for name in ("backbone", "pixel_decoder", "transformer_decoder")}
    if not cfg.MODEL.KMAX.COMPILE:  # inside a compiled part there is nothing to time
        attentions = [name for name, module in model.named_modules() if isinstance(module, AxialAttention1D)]
        inner = {name: f"{name.partition('.')[0]}.axial_attention" for name in attentions}
        stages = inner | {"transformer_decoder.predictor": "final_predictor"} | stages
    _time_parts(model, stages, watch)
    network = model.transformer_decoder.forward

    def with_made_up_masks(*inputs) -> tuple[Prediction, list[Prediction]]:
        final, auxiliary = network(*inputs)
        made_up = made_up_prediction(final.class_logits.shape, final.mask_logits.shape, final.mask_logits.device)
        return Prediction(*made_up, final.pixel_feature), auxiliary

    model.transformer_decoder.forward = with_made_up_masks
    inputs = [{"image": torch.randint(0, 256, (3, *args.size), dtype=torch.uint8)} for _ in range(args.batch_size)]

    def run() -> None:
        with use_precision(args.precision, args.device), torch.inference_mode():
            model(inputs)

    return run


def build_training(cfg: CfgNode, args: argparse.Namespace, watch: Stopwatch) -> Callable[[], object]:
    """One repetition: a training step without the optimizer."""
    model = compile_model(build_model(cfg).train(), cfg.MODEL.KMAX.COMPILE)
    parts = ["backbone", "pixel_decoder", "transformer_decoder", "semantic_head", "criterion"]
    _time_parts(model, {name: name for name in parts if getattr(model, name) is not None}, watch)
    ids, classes = made_up_segments(args.size, cfg.MODEL.KMAX.NUM_CLASSES)
    inputs = [
        {
            "image": torch.randint(0, 256, (3, *args.size), dtype=torch.uint8),
            "segment_ids": ids,
            "segment_classes": classes,
        }
        for _ in range(args.batch_size)
    ]

    def run() -> None:
        model.zero_grad()
        with use_precision(args.precision, args.device):
            loss = sum(model(inputs).values())
        with watch.stage("backward"):
            loss.backward()

    return run


def build_merging(cfg: CfgNode, args: argparse.Namespace, watch: Stopwatch) -> Callable[[], object]:
    """One repetition: predictions of a batch to panoptic maps."""
    model = build_model(cfg)
    queries, classes = cfg.MODEL.KMAX.TRANSFORMER_DECODER.NUM_QUERIES, cfg.MODEL.KMAX.NUM_CLASSES
    stride = model.pixel_decoder.output_shape()[-1].stride
    map_size = [(side - 1) // stride + 1 for side in args.size]
    class_shape = torch.Size((args.batch_size, queries, classes + 1))
    prediction = made_up_prediction(class_shape, torch.Size((args.batch_size, queries, *map_size)), model.device)

    def run() -> None:
        with torch.inference_mode():
            for class_logits, mask_logits in zip(*prediction, strict=True):
                model.merging(class_logits, mask_logits, tuple(args.size))

    return run


def _training_records(cfg: CfgNode) -> Iterator[dict]:
    """The config's training records, over and over."""
    try:
        records = training_records(cfg.DATASETS.TRAIN, filter_empty=False)
    except (FileNotFoundError, AssertionError) as error:
        raise UserError(f"the training data {', '.join(cfg.DATASETS.TRAIN)} are not on disk: {error}") from error
    records = WithPasteSource(records) if cfg.INPUT.COPY_PASTE else records
    return (records[index % len(records)] for index in itertools.count())


def build_mapper(cfg: CfgNode, args: argparse.Namespace, watch: Stopwatch) -> Callable[[], object]:
    """One repetition: one record to a training sample."""
    mapper, records = MAPPER_REGISTRY.get(cfg.INPUT.DATASET_MAPPER_NAME)(cfg), _training_records(cfg)
    return lambda: mapper(next(records))


def build_plain_mapper(cfg: CfgNode, args: argparse.Namespace, watch: Stopwatch) -> Callable[[], object]:
    """One repetition of the mapper's yardstick: what a panoptic mapper of Detectron2 does before it makes targets."""
    side = max(cfg.INPUT.CROP_SIZE)
    augmentations = T.AugmentationList([T.ResizeShortestEdge(side, side), T.RandomFlip()])
    records = _training_records(cfg)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        record = next(records)
        image = detection_utils.read_image(record["file_name"], cfg.INPUT.FORMAT)
        colors = detection_utils.read_image(record["pan_seg_file_name"], "RGB")
        inputs = T.AugInput(image, sem_seg=colors)
        augmentations(inputs)
        image = torch.from_numpy(np.ascontiguousarray(inputs.image.transpose(2, 0, 1)))
        return image, torch.from_numpy(rgb2id(inputs.sem_seg))

    return run


BUILDERS = {
    "inference": build_inference,
    "training": build_training,
    "merging": build_merging,
    "mapper": build_mapper,
}


def _resident_bytes(field: str) -> int:
    """This process's resident memory on Linux: "VmRSS" is that of now, "VmHWM" the largest so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_bytes(build: Callable, cfg: CfgNode, args: argparse.Namespace) -> int | None:
    """Peak memory of building a task and of one repetition, in a process of its own; None where no system tells."""
    if not args.device.startswith("cuda") and not Path("/proc/self/status").exists():
        return None
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_bytes_here, (build, cfg, args))


def _peak_bytes_here(build: Callable, cfg: CfgNode, args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    if args.mode == "mapper" and cfg.DATASETS.OWN_TRAIN:
        prepare_datasets(cfg)  # what the parent has registered is not in this process
    if args.device.startswith("cuda"):
        build(cfg, args, Stopwatch(args.device))()
        return torch.cuda.max_memory_allocated(args.device)
    base = _resident_bytes("VmRSS")
    build(cfg, args, Stopwatch(args.device))()
    return _resident_bytes("VmHWM") - base


def benchmark(cfg: CfgNode, args: argparse.Namespace) -> list[Row]:
    """Measures one mode: the yardstick, the total, and the total's stages."""
    torch.set_num_threads(args.threads)
    watch = Stopwatch(args.device)
    build, build_reference = BUILDERS[args.mode], build_plain_mapper if args.mode == "mapper" else build_yardstick
    reference = "plain Detectron2 mapper" if args.mode == "mapper" else "ResNet-50 body"
    tasks = {
        reference: watch.timed(reference, build_reference(cfg, args, watch)),
        "total": watch.timed("total", build(cfg, args, watch)),
    }
    readings = defaultdict(list)
    for repetition in range(args.repeats + 1):
        for run in tasks.values():
            run()
        seconds = _with_rest(watch.read(), args.mode)
        if repetition > 0:  # the first one warms up
            for name, value in seconds.items():
                readings[name].append(value)
    peaks = {} if args.no_memory else {reference: build_reference, "total": build}
    peaks = {name: peak_bytes(function, cfg, args) for name, function in peaks.items()}
    yardstick = statistics.median(readings[reference])
    rows = []
    for name, values in readings.items():
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        rows.append(Row(name, median, high - low, yardstick, median / yardstick, peaks.get(name)))
    return rows


def _with_rest(seconds: dict[str, float], mode: str) -> dict[str, float]:
    """Names the parts as the paper does, and what no part of the model has taken.

    The stages add up to the total, but for those with a dot, which are within others.
    """
    seconds = dict(seconds)
    total = seconds.pop("total")
    names = {"transformer_decoder": "kmax_decoders", "criterion": "losses"}
    parts = {names.get(name, name): value for name, value in seconds.items()}
    if mode == "inference":
        if "final_predictor" in parts:
            parts["kmax_decoders"] -= parts["final_predictor"]
        stages = ("backbone", "pixel_decoder", "kmax_decoders", "final_predictor")
        parts["merging"] = total - sum(parts.get(name, 0.0) for name in stages)
    return parts | {"total": total}


def _measure(cfg: CfgNode, args: argparse.Namespace, axis: str) -> list[dict[str, Row]]:
    """The rows by name for each of the sides or of the numbers of queries; tells of each on the error stream."""
    results = []
    values = getattr(args, axis)
    for number, value in enumerate(values, start=1):
        own, own_args = cfg.clone(), argparse.Namespace(**vars(args))
        own.defrost()
        if axis == "sides":
            own_args.size = [value, value]
        else:
            own.MODEL.KMAX.TRANSFORMER_DECODER.NUM_QUERIES = value
        results.append({row.name: row for row in benchmark(own, own_args)})
        told = f"{axis} {value}, {number} of {len(values)}: {results[-1]['total'].seconds:.4g} s"
        print(told, file=sys.stderr, flush=True)
    return results


def _lines(results: list[dict[str, Row]]) -> dict[str, list[float]]:
    """Seconds by the name of a line: total, yardstick and, where it was timed, the axial attention of all parts."""
    lines = {name: [rows[name].seconds for rows in results] for name in ("total", "ResNet-50 body")}
    axial = [sum(row.seconds for row in rows.values() if row.name.endswith(".axial_attention")) for rows in results]
    return lines | ({"axial attention": axial} if any(axial) else {})


def _draw(panel, label: str, unit: str, values: Sequence[int], lines: dict[str, list[float]]) -> None:
    for name, line in lines.items():
        panel.plot(values, line, "o-", label=name)
    panel.set(xlabel=label, ylabel=unit, ylim=(0, None))
    panel.grid(alpha=0.3)
    panel.legend()


def plot(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Draws time and memory of inference against the image's side and the number of queries."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layout = [["sides", "queries", "megapixel"]]
    if not args.no_memory:
        layout.append(["sides memory", "queries memory", "megapixel"])
    figure, panels = pyplot.subplot_mosaic(layout, figsize=(15, 4 * len(layout)), constrained_layout=True)
    height, width = args.size
    for axis, label in {"sides": "image side (pixels)", "queries": f"queries, at {height}×{width} pixels"}.items():
        values, results = getattr(args, axis), _measure(cfg, args, axis)
        lines = _lines(results)
        _draw(panels[axis], label, "seconds", values, lines)
        if not args.no_memory:
            peaks = {name: [(rows[name].peak_bytes or math.nan) / 1e9 for rows in results] for name in list(lines)[:2]}
            _draw(panels[f"{axis} memory"], label, "peak memory (GB)", values, peaks)
        if axis == "sides":
            if "axial attention" in lines:
                pairs = zip(lines["total"], lines["axial attention"], strict=True)
                lines["total without axial attention"] = [total - axial for total, axial in pairs]
            megapixels = [args.batch_size * side**2 / 1e6 for side in values]
            shares = {name: [t / m for t, m in zip(line, megapixels, strict=True)] for name, line in lines.items()}
            _draw(panels["megapixel"], label, "seconds per megapixel", values, shares)
    threads = f", {args.threads} threads" if args.device == "cpu" else ""
    figure.suptitle(f"{args.config_file}, batch {args.batch_size}, {args.precision} on {args.device}{threads}")
    figure.savefig(args.plot, dpi=120)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config file or name, such as coco/r50")
    parser.add_argument(
        "--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="of the images (the config's crop)"
    )
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--device", help="cpu or cuda (the config's, or cpu where there is no GPU)")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="of the model; not the yardstick's")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--compile", nargs="?", const="default", choices=COMPILE_MODES, help="the same as the option MODEL.KMAX.COMPILE"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    parser.add_argument("--json", action="store_true", help="print a list of rows")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw how inference grows, as a PNG, instead")
    parser.add_argument("--sides", nargs="+", type=int, default=SIDES, metavar="PIXELS", help="to draw it for")
    parser.add_argument("--queries", nargs="+", type=int, default=QUERIES, metavar="N", help="to draw it for")
    parser.add_argument("--train-data", nargs=3, metavar=("IMAGES", "PNGS", "JSON"), help="own data for the mapper")
    parser.add_argument("opts", nargs="*", metavar="NAME VALUE", help="config options to change")
    return parser


def prepare(args: argparse.Namespace) -> CfgNode:
    """The config to measure; fills in the arguments that it gives a default for."""
    cfg = load_config(args.config_file, args.opts)
    if args.train_data:
        cfg.DATASETS.OWN_TRAIN = args.train_data
        cfg.DATASETS.TEST = ()
    if args.train_data or cfg.MODEL.KMAX.NUM_CLASSES == 0:
        prepare_datasets(cfg)
    cfg.MODEL.DEVICE = args.device or cfg.MODEL.DEVICE
    choose_device(cfg)
    args.device, args.size = cfg.MODEL.DEVICE, args.size or list(cfg.INPUT.CROP_SIZE)
    if min(*args.size, args.batch_size, args.repeats, args.threads, *args.sides, *args.queries) < 1:
        raise UserError("--size, --batch-size, --repeats, --threads, --sides and --queries are at least 1")
    cfg.MODEL.KMAX.COMPILE = args.compile or cfg.MODEL.KMAX.COMPILE
    test = cfg.MODEL.KMAX.TEST
    test.PRECISION = args.precision
    test.PAD_TO_CROP = False  # images of just the given size
    test.PANOPTIC_ON, test.SEMANTIC_ON, test.INSTANCE_ON = True, False, False
    cfg.MODEL.KMAX.TIMM.PRETRAINED = False
    if args.mode == "mapper":
        cfg.INPUT.CROP_SIZE = args.size
    return cfg


def main() -> None:
    args = argument_parser().parse_intermixed_args()
    cfg = prepare(args)
    if args.plot:
        if args.mode != "inference":
            raise UserError("--plot shows inference")
        plot(cfg, args)
        return
    rows = benchmark(cfg, args)
    if args.json:
        print(json.dumps([row._asdict() for row in rows], indent=2))
        return
    height, width = args.size
    print(
        f"{args.config_file}, {args.mode}, {args.batch_size} × {height}×{width}, {args.precision} on {args.device}, "
        f"{args.threads} threads"
    )
    table = [
        (
            row.name.replace("_", " "),
            row.seconds,
            row.spread,
            row.ratio,
            None if row.peak_bytes is None else row.peak_bytes / 1e9,
        )
        for row in rows
    ]
    headers = ["stage", "seconds", "spread", "ratio to the yardstick", "peak memory (GB)"]
    print(tabulate(table, headers=headers, floatfmt=("", ".4f", ".4f", ".2f", ".2f"), tablefmt="github"))


if __name__ == "__main__":
    exit_on_user_error(main)
