"""Writes a model as one file for other runtimes: ONNX, OpenVINO, PyTorch's exported programs, or TorchScript.

python -m kmax_d2.tools.export --config-file coco/r50 --format onnx --output r50.onnx [--dynamic] [NAME VALUE ...]

The file takes images (B, H, W, 3), uint8, RGB, at the size at which the model is to run. With --what panoptic it gives
segment ids (B, H, W), int32, 0 for void, and a table (B, N, 3) with the class, the score, and the area of segment i in
row i - 1; with --what network class logits (B, N, K + 1) and mask logits (B, N, h, w). Images are padded to the next
32k + 1 pixels a side. demo/onnx_demo.py runs such a file without PyTorch.
"""

from collections.abc import Sequence
from pathlib import Path

from ..command_line import ConfigParser, run_program, whole

FORMATS = {"onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2", "torchscript": ".ts"}
PRECISIONS = ("float32", "float16", "bfloat16", "int8")
PARSER = ConfigParser(__doc__, weights=True, overwrite=True)
PARSER.add_argument("--format", required=True, choices=FORMATS)
PARSER.add_argument("--output", required=True, type=Path, metavar="FILE", help=f"ends in {', '.join(FORMATS.values())}")
PARSER.add_argument("--what", default="panoptic", choices=("panoptic", "network"), help="(%(default)s)")
PARSER.add_argument(
    "--size",
    nargs=2,
    type=whole("--size", 1, 2**15),
    metavar=("HEIGHT", "WIDTH"),
    help="of the images (the config's crop)",
)
PARSER.add_argument("--dynamic", action="store_true", help="images of any size, in batches of any size")
PARSER.add_argument("--precision", default="float32", choices=PRECISIONS, help="(%(default)s)")
PARSER.add_argument("--images", type=Path, metavar="FOLDER", help="int8: images to measure activations on")

PARSER.parse_if_main(__name__)

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import torch
from torch import nn

from ..engine import load_model
from ..errors import UserError, optional_package
from ..export import NetworkGraph, PanopticGraph
from ..files import whole_file
from ..images import images_in, read_rgb
from ..inference.predictor import predictor_config
from ..speed import fold_batch_norms

OUTPUTS = {"panoptic": ["ids", "segments"], "network": ["class_logits", "mask_logits"]}
MOST_SAMPLES = 128  # images that int8 measures activations on


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leaves out what the exporters say about their own insides."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def to_onnx(graph: nn.Module, example: torch.Tensor, dynamic: bool, outputs: Sequence[str]) -> Any:
    """Returns an `onnx.ModelProto`."""
    optional_package("onnxscript", "export")
    exported: Any = torch.onnx.export(
        to_torch(graph, example, dynamic),
        input_names=["images"],
        output_names=list(outputs),
        dynamo=True,
        verbose=False,
        opset_version=18,
    )
    return exported.model_proto


def to_torch(graph: nn.Module, example: torch.Tensor, dynamic: bool) -> torch.export.ExportedProgram:
    """Returns PyTorch's exported program. Raises UserError if PyTorch is too old."""
    if torch.__version__ < "2.7":
        raise UserError(f"this format needs PyTorch 2.7 or newer, and here is {torch.__version__}")
    any_size = torch.export.Dim.AUTO
    shapes = {"images": {0: any_size, 1: any_size, 2: any_size}} if dynamic else None
    return torch.export.export(graph, (example,), dynamic_shapes=shapes)


def samples(folder: Path, size: tuple[int, int]) -> list[np.ndarray]:
    """Returns images of a folder at the size (height, width): (1, H, W, 3), uint8, RGB."""
    return [cv2.resize(read_rgb(str(file)), size[::-1])[None] for file in images_in(folder)[:MOST_SAMPLES]]


def write(graph: nn.Module, args: Any, example: torch.Tensor, file: Path) -> None:
    """Writes the graph in the format, size, and precision of the parsed command line."""
    if args.format == "pt2":
        stream = io.BytesIO()  # PyTorch ends the process where a file cannot be written
        torch.export.save(to_torch(graph, example, args.dynamic), stream)
        file.write_bytes(stream.getbuffer())
        return
    if args.format == "torchscript":
        stream = io.BytesIO()
        torch.jit.save(torch.jit.trace(graph, example, check_trace=False), stream)
        file.write_bytes(stream.getbuffer())
        return
    model, onnx = to_onnx(graph, example, args.dynamic, OUTPUTS[args.what]), optional_package("onnx", "export")
    if args.format == "openvino":
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".kmax_d2_") as folder:
            onnx.save(model, Path(folder) / "model.onnx")
            model = optional_package("openvino", "export").convert_model(Path(folder) / "model.onnx")
    if args.precision == "int8":
        nncf = optional_package("nncf", "export")
        name = "images" if args.format == "onnx" else 0
        dataset = nncf.Dataset(samples(args.images, args.size), lambda image: {name: image})
        model = nncf.quantize(model, dataset, subset_size=MOST_SAMPLES)
    if args.format == "onnx":
        onnx.save(model, file)
    else:
        optional_package("openvino", "export").save_model(model, file, compress_to_fp16=args.precision == "float16")


def check(args: Any) -> None:
    """Raises UserError for arguments that do not go together."""
    if args.output.suffix != FORMATS[args.format]:
        raise UserError(f"the name of an output in the format {args.format} must end in {FORMATS[args.format]}")
    if args.dynamic and args.format == "torchscript":
        raise UserError("TorchScript keeps the size it was traced with: leave --dynamic out, or use another format")
    if args.precision == "bfloat16" and args.format in ("onnx", "openvino"):
        raise UserError(f"{args.format} takes bfloat16 from the runtime: export float32, and set its precision there")
    if args.precision == "int8" and (args.format in ("pt2", "torchscript") or args.images is None):
        raise UserError("--precision int8 needs --format onnx or openvino, and --images with some training images")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command line; None takes that of the process."""
    args = PARSER.parse(argv)
    check(args)
    weights_file = args.output.with_suffix(".bin")  # of OpenVINO
    for file in (args.output, weights_file) if args.format == "openvino" else (args.output,):
        if file.exists() and not args.overwrite:
            raise UserError(f"{file} exists: choose another name, or add --overwrite")
    cfg = predictor_config(args.config_file, [*args.opts, "MODEL.DEVICE", "cpu"])
    args.size = tuple(args.size or cfg.INPUT.CROP_SIZE)
    dtype = getattr(torch, args.precision) if args.format != "openvino" and "float" in args.precision else torch.float32
    graph = (PanopticGraph if args.what == "panoptic" else NetworkGraph)(
        fold_batch_norms(load_model(cfg).eval(), dtype), dtype
    ).eval()
    example = torch.randint(0, 256, (2 if args.dynamic else 1, *args.size, 3), dtype=torch.uint8)
    with whole_file(args.output) as unfinished, torch.no_grad(), quiet():
        write(graph, args, example, unfinished)
        if unfinished.with_suffix(".bin").exists():
            unfinished.with_suffix(".bin").replace(weights_file)
    print(
        f"{args.what} of {args.config_file} for {args.format}: {args.output} ({args.output.stat().st_size >> 10} KiB)"
    )


if __name__ == "__main__":
    run_program(main)
