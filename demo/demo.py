#!/usr/bin/env python
"""Segments images and draws the results, with any config and weights.

Without --config-file, it uses coco/r50 with its published weights, or the quickstart's model if they are unavailable.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

PARSES_FIRST = True  # read by kmax_d2, which then does not import PyTorch yet

from kmax_d2.command_line import ConfigParser, run_program

PARSER = ConfigParser(__doc__, config_file=False, weights=True, overwrite=True, options="--opts")
PARSER.add_argument(
    "--input", nargs="+", required=True, metavar="IMAGE", help='images, folders of images, or patterns like "*.jpg"'
)
PARSER.add_argument("--output", default="output/demo", metavar="DIR", help="folder for the results (%(default)s)")
PARSER.add_argument("--assignments", action="store_true", help="also draw each decoder's assignment of pixels")

if __name__ == "__main__":
    PARSER.parse()  # answers --help and mistakes before the slow imports

import time
from collections import Counter
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata
from torch import nn
from tqdm import tqdm

from kmax_d2 import model_zoo
from kmax_d2.data.mapper import PanopticTestMapper, read_image
from kmax_d2.engine import load_predictor, ready_config
from kmax_d2.engine.setup import dataset_metadata
from kmax_d2.errors import UserError
from kmax_d2.files import make_folder, require_own, write_png
from kmax_d2.images import find_images
from kmax_d2.speed import use_precision
from kmax_d2.visualization import draw_panoptic, result_page

DEFAULT_CONFIG = "coco/r50"
QUICKSTART_CONFIG = "shapes/quickstart"


def setup(args: argparse.Namespace, default: str = DEFAULT_CONFIG) -> CfgNode:
    """Returns the ready config of the command line, or else of `default`; its weights are those named, or trained ones.

    Raises UserError if the config, an option, or a dataset is wrong.
    """
    config = args.config_file or default
    return ready_config(config, [*model_zoo.trained_weights(config), *args.opts])


def load(args: argparse.Namespace) -> tuple[CfgNode, nn.Module]:
    """Returns config and predictor: those asked for, or if nothing was, those available. Raises UserError."""
    cfg = setup(args)
    dataset_metadata(cfg)  # fails before the model is loaded
    try:
        return cfg, load_predictor(cfg)
    except UserError as error:
        if args.config_file or "MODEL.WEIGHTS" in args.opts:
            raise
        print(f"continuing with the quickstart's model in place of {DEFAULT_CONFIG}: {error}", file=sys.stderr)
    cfg = setup(args, QUICKSTART_CONFIG)
    return cfg, load_predictor(cfg)


def name_outputs(files: Sequence[Path], folder: Path, endings: Sequence[str]) -> dict[Path, str]:
    """Returns a stem for each input, numbered where needed, so that no result overwrites another or an input."""
    taken = {file.resolve() for file in files}
    stems = {}
    for file in files:
        stem, number = file.stem, 1
        while taken & {(folder / (stem + ending)).resolve() for ending in endings}:
            number += 1
            stem = f"{file.stem}-{number}"
        taken |= {(folder / (stem + ending)).resolve() for ending in endings}
        stems[file] = stem
    return stems


def describe(segments: list[dict], class_names: Sequence[str]) -> str:
    """Returns a summary such as "3 star, 1 sky"."""
    counts = Counter(class_names[segment["category_id"]] for segment in segments)
    return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "no segments"


def segment_file(
    model: nn.Module, mapper: PanopticTestMapper, file: Path, metadata: Metadata, output: str, pages: bool
) -> str:
    """Segments an image, writes `output`.png and, with `pages`, `output`_assignments.png, and returns a summary."""
    start = time.perf_counter()
    image = read_image({"file_name": str(file)})
    record = mapper({"file_name": str(file)})
    with torch.no_grad():
        segment_ids, segments = model([record])[0]["panoptic_seg"]
    write_png(Path(f"{output}.png"), draw_panoptic(image, segment_ids, segments, metadata))
    if pages:
        write_png(Path(f"{output}_assignments.png"), result_page(model, record, metadata))
    return f"{file} -> {output}.png: {describe(segments, metadata.stuff_classes)} ({time.perf_counter() - start:.1f} s)"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command line; None takes that of the process."""
    args = PARSER.parse(argv)
    files, errors = find_images(args.input)
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    written = 0
    if files:
        folder, endings = Path(args.output), [".png", "_assignments.png"] if args.assignments else [".png"]
        stems = name_outputs(files, folder, endings)
        require_own([folder / (stem + ending) for stem in stems.values() for ending in endings], args.overwrite)
        cfg, model = load(args)
        make_folder(folder)
        metadata, mapper = dataset_metadata(cfg), PanopticTestMapper(cfg)
        with use_precision(cfg.MODEL.KMAX.TEST.PRECISION, cfg.MODEL.DEVICE):
            for file in tqdm(files, unit="image", disable=None):
                try:
                    summary = segment_file(model, mapper, file, metadata, str(folder / stems[file]), args.assignments)
                except UserError as error:
                    tqdm.write(f"error: {error}", file=sys.stderr)
                else:
                    tqdm.write(summary)
                    written += 1
    total = len(files) + len(errors)
    print(f"{written} of {total} images written to {args.output}")
    if written < total:
        sys.exit(1)


if __name__ == "__main__":
    run_program(main)
