"""Time and memory of a model beside a plain ResNet-50 body that is measured in the same run.

`python -m kmax_d2.tools.benchmark {inference,training,merging,mapper} --config-file coco/r50 --size 641 641
[--batch-size 1] [--device cpu] [--precision float32] [--threads 2] [--compile] [--json] [--plot FILE] [NAME VALUE ...]`

- `inference`: from uint8 images to panoptic results, merging included, with batch norms folded.
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
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import multiprocessing
import statistics
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
from panopticapi.utils import rgb2id
from tabulate import tabulate
from torch import nn

from ..data import MAPPER_REGISTRY, WithPartner, training_records
from ..engine import load_config
from ..engine.setup import choose_device, prepare_datasets
from ..errors import UserError, exit_on_user_error
from ..modeling.fold import fold_batch_norms
from ..modeling.predictor import Prediction

MODES = ("inference", "training", "merging", "mapper")
PRECISIONS = ("float32", "tf32", "bfloat16")
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


@contextlib.contextmanager
def numbers(precision: str, device: str) -> Iterator[None]:
    """Runs what is inside in one of PRECISIONS."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16"):
        yield


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
        with numbers("float32", args.device), torch.inference_mode(not training):
            out = body(x)
            if training:
                body.zero_grad()
                out.mean().backward()

    return run


def _time_parts(model: nn.Module, names: Sequence[str], args: argparse.Namespace, watch: Stopwatch) -> None:
    """Makes parts of the model stages of the watch, compiled where asked for."""
    for name in names:
        part = model.get_submodule(name)
        part.forward = watch.timed(name, torch.compile(part.forward) if args.compile else part.forward)


def build_inference(cfg: CfgNode, args: argparse.Namespace, watch: Stopwatch) -> Callable[[], object]:
    """One repetition: a batch of images to panoptic results."""
    model = fold_batch_norms(build_model(cfg).eval())
    parts = ["backbone", "pixel_decoder", "transformer_decoder"]
    # Inside a compiled part there is nothing to time.
    _time_parts(model, parts if args.compile else [*parts, "transformer_decoder.predictor"], args, watch)
    network = model.transformer_decoder.forward

    def with_made_up_masks(*inputs) -> tuple[Prediction, list[Prediction]]:
        final, auxiliary = network(*inputs)
        made_up = made_up_prediction(final.class_logits.shape, final.mask_logits.shape, final.mask_logits.device)
        return Prediction(*made_up, final.pixel_feature), auxiliary

    model.transformer_decoder.forward = with_made_up_masks
    inputs = [{"image": torch.randint(0, 256, (3, *args.size), dtype=torch.uint8)} for _ in range(args.batch_size)]

    def run() -> None:
        with numbers(args.precision, args.device), torch.inference_mode():
            model(inputs)

    return run


def build_training(cfg: CfgNode, args: argparse.Namespace, watch: Stopwatch) -> Callable[[], object]:
    """One repetition: a training step without the optimizer."""
    model = build_model(cfg).train()
    parts = ["backbone", "pixel_decoder", "transformer_decoder", "semantic_head", "criterion"]
    _time_parts(model, [name for name in parts if getattr(model, name) is not None], args, watch)
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
        with numbers(args.precision, args.device):
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
    records = WithPartner(records) if cfg.INPUT.COPY_PASTE else records
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
    """Names the parts as the paper does, and what no part of the model has taken."""
    seconds = dict(seconds)
    total = seconds.pop("total")
    predictor = seconds.pop("transformer_decoder.predictor", 0.0)
    names = {"transformer_decoder": "kmax_decoders", "criterion": "losses"}
    parts = {names.get(name, name): value for name, value in seconds.items()}
    if mode == "inference":
        if predictor:
            parts["kmax_decoders"] -= predictor
            parts["final_predictor"] = predictor
        stages = ("backbone", "pixel_decoder", "kmax_decoders", "final_predictor")
        parts["merging"] = total - sum(parts.get(name, 0.0) for name in stages)
    return parts | {"total": total}


def plot(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Draws time and memory of inference against the image's side and the number of queries."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), constrained_layout=True)
    variants = {"image side (pixels)": SIDES, "queries": QUERIES}
    for column, (label, values) in enumerate(variants.items()):
        results = []
        for value in values:
            own, own_args = cfg.clone(), argparse.Namespace(**vars(args))
            own.defrost()
            if column == 0:
                own_args.size = [value, value]
            else:
                own.MODEL.KMAX.TRANSFORMER_DECODER.NUM_QUERIES = value
            results.append({row.name: row for row in benchmark(own, own_args)})
        for name in ("total", "ResNet-50 body"):
            axes[0, column].plot(values, [result[name].seconds for result in results], "o-", label=name)
            axes[1, column].plot(values, [result[name].peak_bytes / 1e9 for result in results], "o-", label=name)
        axes[0, column].set(xlabel=label, ylabel="seconds", ylim=(0, None))
        axes[1, column].set(xlabel=label, ylabel="peak memory (GB)", ylim=(0, None))
    axes[0, 0].legend()
    figure.suptitle(f"{args.config_file}, batch {args.batch_size}, {args.precision} on {args.device}")
    figure.savefig(args.plot)


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
    parser.add_argument("--compile", action="store_true", help="torch.compile the model's parts")
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    parser.add_argument("--json", action="store_true", help="print a list of rows")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw how inference grows, as a PNG, instead")
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
    if min(*args.size, args.batch_size, args.repeats, args.threads) < 1:
        raise UserError("--size, --batch-size, --repeats and --threads are at least 1")
    test = cfg.MODEL.KMAX.TEST
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
        if args.mode != "inference" or args.no_memory:
            raise UserError("--plot shows time and memory of inference")
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
