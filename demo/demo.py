#!/usr/bin/env python
"""Segments images or a video and draws the results, with any config and weights.

Without --config-file, it uses coco/r50 with its published weights, or the included model if they are unavailable.
"""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence

PARSES_FIRST = True  # read by kmax_d2, which then does not import PyTorch yet

from kmax_d2.command_line import ConfigParser, run_program

PARSER = ConfigParser(__doc__, config_file=False, weights=True, overwrite=True, options="--opts")
SOURCE = PARSER.add_mutually_exclusive_group(required=True)
IMAGES = 'images, folders of images, patterns like "*.jpg", or addresses'
SOURCE.add_argument("--input", nargs="+", metavar="IMAGE", help=IMAGES)
SOURCE.add_argument("--video-input", metavar="FILE", help="a video")
SOURCE.add_argument("--webcam", type=int, nargs="?", const=0, metavar="NUMBER", help="a camera, until Ctrl-C")
OUTPUT = "folder for the results (%(default)s); of a video also the .avi, .mkv, or .mp4 file"
PARSER.add_argument("--output", default="output/demo", metavar="DIR", help=OUTPUT)
PARSER.add_argument("--assignments", action="store_true", help="also draw each decoder's assignment of pixels")
PARSER.add_argument("--tile", type=int, metavar="SIZE", help="segment large images in tiles of this side in pixels")
PARSER.add_argument("--save-json", metavar="FILE", help="also write COCO panoptic JSON, and PNGs to a folder beside it")
PARSER.add_argument("--save-instances", metavar="FILE", help="also write COCO instance JSON with RLE masks")
PARSER.add_argument("--save-semantic", metavar="DIR", help="also write PNGs of category ids")

PARSER.parse_if_main(__name__)

import functools
import os
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from kmax_d2.errors import UserError
from kmax_d2.files import make_folder, require_own, write_png
from kmax_d2.images import find_images, stem_of
from kmax_d2.inference import Predictor, Result, load
from kmax_d2.inference.coco_files import CocoFiles, png_folder
from kmax_d2.inference.tiles import LEAST_SIZE
from kmax_d2.inference.video import VideoReader, VideoWriter, video_file

Outputs = list[tuple[Path, str]]  # for each file of an image its folder, and what follows the stem in its name


def name_outputs(sources: Sequence[str], outputs: Outputs) -> dict[str, str]:
    """Returns a stem for each input, numbered where needed, so that no result overwrites another or an input."""
    taken = {Path(source).resolve() for source in sources}
    stems = {}
    for source in sources:
        stem, number = stem_of(source), 1
        while taken & {(folder / (stem + ending)).resolve() for folder, ending in outputs}:
            number += 1
            stem = f"{stem_of(source)}-{number}"
        taken |= {(folder / (stem + ending)).resolve() for folder, ending in outputs}
        stems[source] = stem
    return stems


def describe(result: Result) -> str:
    """Returns a summary such as "3 star, 1 sky"."""
    counts = Counter(segment.class_name for segment in result.panoptic.segments)
    return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "no segments"


def common_folder(sources: Sequence[str]) -> str:
    """Returns the folder that all files are in, below which they are named in JSONs."""
    folders = [os.path.dirname(os.path.abspath(source)) for source in sources if os.path.isfile(source)]
    return os.path.commonpath(folders) if folders else ""


def load_model(args: argparse.Namespace) -> tuple[Predictor, Callable[..., Result]]:
    """Returns the predictor, and the function that segments an image with it, whole or in tiles."""
    predict = load(args.config_file or "", options=args.opts)
    return predict, predict if args.tile is None else functools.partial(predict.tiled, size=args.tile)


def segment_images(args: argparse.Namespace) -> None:
    """Segments images and writes what is asked for; one that cannot be read does not stop the others."""
    sources, errors = find_images(args.input)
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    written, folder = 0, Path(args.output)
    if sources:
        paths = args.save_json, args.save_instances, args.save_semantic
        panoptic, instances, semantic = (Path(path) if path else None for path in paths)
        named = [folder, *(path for path in (panoptic, panoptic and png_folder(panoptic), instances, semantic) if path)]
        if len({path.resolve() for path in named}) < len(named):
            raise UserError("two outputs have one name: choose others for --output, --save-json, and the like")
        outputs = [(folder, ".png")] + ([(folder, "_assignments.png")] if args.assignments else [])
        outputs += [(place, ".png") for place in (panoptic and png_folder(panoptic), semantic) if place]
        stems = name_outputs(sources, outputs)
        files = [place / (stem + ending) for stem in stems.values() for place, ending in outputs]
        require_own([*files, *(file for file in (panoptic, instances) if file)], args.overwrite)
        predict, segment = load_model(args)
        make_folder(folder)
        common = common_folder(sources)
        with CocoFiles(predict.metadata, panoptic, instances, semantic) as coco_files:
            for source in tqdm(sources, unit="image", disable=None):
                start, output = time.perf_counter(), folder / stems[source]
                try:
                    result = segment(source)
                    write_png(Path(f"{output}.png"), result.draw())
                    if args.assignments:
                        write_png(Path(f"{output}_assignments.png"), result.draw("clusters"))
                    name = os.path.relpath(source, common) if os.path.isfile(source) else source
                    coco_files.add(result, name, stems[source])
                except UserError as error:
                    tqdm.write(f"error: {error}", file=sys.stderr)
                else:
                    seconds = time.perf_counter() - start
                    tqdm.write(f"{source} -> {output}.png: {describe(result)} ({seconds:.1f} s)")
                    written += 1
    total = len(sources) + len(errors)
    print(f"{written} of {total} images written to {args.output}")
    if written < total:
        sys.exit(1)


def segment_video(args: argparse.Namespace) -> None:
    """Segments a video, or what a camera sees, and writes a video; what is written when it is interrupted is kept."""
    if args.save_json or args.save_instances or args.save_semantic or args.assignments:
        raise UserError("--save-json, --save-instances, --save-semantic, and --assignments are for images (--input)")
    if args.webcam is not None and args.webcam < 0:
        raise UserError(f"--webcam is {args.webcam}, but must be the number of a camera, from 0")
    source = args.video_input or f"camera-{args.webcam}"
    file = video_file(args.output, name_outputs([source], [(Path(args.output), ".avi")])[source])
    if file.resolve() == Path(source).resolve():
        raise UserError(f"{file} is the input: choose another --output")
    reader = VideoReader(args.video_input or args.webcam)
    require_own([file], args.overwrite)
    _, segment = load_model(args)
    written, start = 0, time.perf_counter()
    try:
        with VideoWriter(file, reader.rate) as writer:
            for frame in tqdm(reader, total=reader.count or None, unit="frame", disable=None):
                picture = segment(frame).draw()
                if args.webcam is not None and not written:  # as many frames a second as are segmented
                    writer.rate = min(reader.rate, 1 / (time.perf_counter() - start))
                writer.write(picture)
                written += 1
    finally:
        rate = written / (time.perf_counter() - start)
        print(f"{source} -> {file}: {written} frames, {rate:.1f} frames a second")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command line; None takes that of the process."""
    args = PARSER.parse(argv)
    if args.tile is not None and args.tile < LEAST_SIZE:
        raise UserError(f"--tile must be at least {LEAST_SIZE} pixels, not {args.tile}")
    if args.tile is not None and args.assignments:
        raise UserError("--assignments are those of a whole image: leave out --tile")
    if args.input:
        segment_images(args)
    else:
        segment_video(args)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is written so far is completed
    run_program(main)
