#!/usr/bin/env python
"""Segments images and draws the results, with any config and weights.

Without a config with coco/r50 and its published weights; where these cannot be had, with the quickstart's model.
"""

from __future__ import annotations

import argparse
import glob
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image
from torch import nn
from tqdm import tqdm

import kmax_d2
from kmax_d2 import model_zoo
from kmax_d2.checkpoint import load_weights
from kmax_d2.checkpoint.download import download, is_address
from kmax_d2.data.mapper import PanopticTestMapper, read_image
from kmax_d2.speed import inference_model, require_precision, use_precision
from kmax_d2.engine.setup import choose_device, load_config, prepare_datasets
from kmax_d2.errors import UserError, exit_on_user_error
from kmax_d2.visualization import draw_panoptic, result_page

DEFAULT_CONFIG = "coco/r50"
QUICKSTART_CONFIG = "shapes/quickstart"
QUICKSTART_WEIGHTS = (
    Path(kmax_d2.__file__).parent / "assets" / "quickstart.pth",
    Path("output/quickstart/model_final.pth"),
)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="IMAGE", help='images, folders of images, or patterns like "*.jpg"'
    )
    parser.add_argument("--output", default="output/demo", metavar="DIR", help="folder of the results (%(default)s)")
    parser.add_argument("--config-file", metavar="FILE", help="config file or name (coco/r50)")
    parser.add_argument("--weights", metavar="FILE", help="checkpoint, the same as the option MODEL.WEIGHTS")
    parser.add_argument(
        "--assignments", action="store_true", help="also draw which cluster each decoder assigns each pixel to"
    )
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="options of the config; they come last",
    )
    return parser.parse_args(arguments)


def names_weights(args: argparse.Namespace) -> bool:
    return bool(args.weights) or "MODEL.WEIGHTS" in args.opts


def quickstart_weights() -> str:
    found = [str(file) for file in QUICKSTART_WEIGHTS if file.is_file()]
    if not found:
        raise UserError(
            "the quickstart's weights are not there: run `make quickstart` first, "
            "or give --config-file FILE and --opts MODEL.WEIGHTS FILE"
        )
    return found[0]


def setup(args: argparse.Namespace, default: str = DEFAULT_CONFIG) -> CfgNode:
    """The frozen config of the command line, or `default`; with the weights named, or else those published for it."""
    name = args.config_file or default
    cfg = load_config(name, args.opts)
    if args.weights:
        cfg.MODEL.WEIGHTS = args.weights
    elif not names_weights(args):
        if name == QUICKSTART_CONFIG:
            cfg.MODEL.WEIGHTS = quickstart_weights()
        elif model_zoo.has_weights(name):
            cfg.MODEL.WEIGHTS = model_zoo.get_checkpoint_url(name)
    prepare_datasets(cfg)
    if not (cfg.DATASETS.TEST or cfg.DATASETS.TRAIN):
        raise UserError("no class names: name a dataset in DATASETS.TEST")
    require_precision(cfg.MODEL.KMAX.TEST.PRECISION)
    choose_device(cfg)
    cfg.MODEL.KMAX.TEST.SEMANTIC_ON = cfg.MODEL.KMAX.TEST.INSTANCE_ON = False
    cfg.MODEL.KMAX.TEST.PANOPTIC_ON = True
    cfg.freeze()
    return cfg


def build_trained(cfg: CfgNode) -> nn.Module:
    """The config's model in inference mode with its weights."""
    if is_address(cfg.MODEL.WEIGHTS):
        download(cfg.MODEL.WEIGHTS)  # fails before the model is built
    model = build_model(cfg).eval()
    load_weights(model, cfg.MODEL.WEIGHTS)
    return inference_model(model, cfg)


def load(args: argparse.Namespace) -> tuple[CfgNode, nn.Module]:
    """The config and the model to segment with: where nothing else is asked for, what can be had."""
    cfg = setup(args)
    try:
        return cfg, build_trained(cfg)
    except UserError as error:
        if args.config_file or names_weights(args):
            raise
        print(f"going on with the quickstart's model in place of {DEFAULT_CONFIG}: {error}", file=sys.stderr)
    cfg = setup(args, QUICKSTART_CONFIG)
    return cfg, build_trained(cfg)


def find_images(inputs: Iterable[str]) -> tuple[list[Path], list[str]]:
    """The files that files, folders and patterns name, each once, and a line for each input that names none."""
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files: dict[Path, Path] = {}
    problems = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            matches = sorted(file for file in path.iterdir() if file.is_file() and file.suffix.lower() in known)
            problem = f"no images in the folder {name}"
        elif path.exists():
            matches, problem = [path], ""
        else:
            matches = [Path(match) for match in sorted(glob.glob(name, recursive=True)) if os.path.isfile(match)]
            problem = f"no file matches {name}" if glob.has_magic(name) else f"no file {name}"
        if not matches:
            problems.append(problem)
        for file in matches:
            files.setdefault(file.resolve(), file)
    return list(files.values()), problems


def name_outputs(files: list[Path], folder: Path, endings: list[str]) -> dict[Path, str]:
    """A stem for each input, its own or one with a number, so that no result meets another or an input."""
    taken = {str(file.resolve()) for file in files}
    stems = {}
    for file in files:
        stem, number = file.stem, 1
        while taken & {str((folder / (stem + ending)).resolve()) for ending in endings}:
            number += 1
            stem = f"{file.stem}-{number}"
        taken |= {str((folder / (stem + ending)).resolve()) for ending in endings}
        stems[file] = stem
    return stems


def write_png(image: np.ndarray, file: Path) -> None:
    """Writes under another name first, so that no half a file is left."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        Image.fromarray(image).save(unfinished, format="PNG")
        os.replace(unfinished, file)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def describe(segments: list[dict], class_names: list[str]) -> str:
    """For example "3 star, 1 sky"."""
    counts = Counter(class_names[segment["category_id"]] for segment in segments)
    return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "no segments"


def segment_file(model: nn.Module, mapper: PanopticTestMapper, file: Path, metadata, output: str, pages: bool) -> str:
    """Segments one image, writes `output`.png and perhaps `output`_assignments.png, and gives a summary."""
    start = time.perf_counter()
    image = read_image({"file_name": str(file)})
    record = mapper({"file_name": str(file)})
    with torch.no_grad():
        segment_ids, segments = model([record])[0]["panoptic_seg"]
    write_png(draw_panoptic(image, segment_ids, segments, metadata), Path(f"{output}.png"))
    if pages:
        write_png(result_page(model, record, metadata), Path(f"{output}_assignments.png"))
    return f"{file} -> {output}.png: {describe(segments, metadata.stuff_classes)} ({time.perf_counter() - start:.1f} s)"


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    files, problems = find_images(args.input)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    written = 0
    if files:
        cfg, model = load(args)
        metadata = MetadataCatalog.get([*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN][0])
        mapper = PanopticTestMapper(cfg)
        folder = Path(args.output)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {folder}: {error.strerror}") from error
        stems = name_outputs(files, folder, [".png", "_assignments.png"] if args.assignments else [".png"])
        with use_precision(cfg.MODEL.KMAX.TEST.PRECISION, cfg.MODEL.DEVICE):
            for file in tqdm(files, unit="image", disable=None):
                try:
                    summary = segment_file(model, mapper, file, metadata, str(folder / stems[file]), args.assignments)
                except UserError as error:
                    tqdm.write(f"error: {error}", file=sys.stderr)
                else:
                    tqdm.write(summary)
                    written += 1
    total = len(files) + len(problems)
    print(f"{written} of {total} images written to {args.output}")
    if written < total:
        sys.exit(1)


if __name__ == "__main__":
    exit_on_user_error(main)
