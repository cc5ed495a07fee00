"""Times one model from image to panoptic result in PyTorch, ONNX Runtime, and OpenVINO, beside a ResNet-50 body.

python -m kmax_d2.tools.compare_runtimes --config-file coco/r50 [--sizes 641 1281] [--threads 2] [NAME VALUE ...]

Weights and images are random. The baseline is torchvision's ResNet-50 without pooling and head in float32, in the same
run. With --others, Hugging Face's Mask2Former (ResNet-50) and EoMT (base) are timed too, with random weights, including
their conversion to a panoptic result. Runtimes take turns; seconds are medians.
"""

from collections.abc import Callable, Iterator, Sequence

from ..command_line import ConfigParser, run_program, whole

PARSER = ConfigParser(__doc__)
PARSER.add_argument(
    "--sizes",
    nargs="+",
    type=whole("--sizes", 1, 2**15),
    default=[641],
    metavar="SIDE",
    help="of square images (%(default)s)",
)
PARSER.add_argument(
    "--threads", type=whole("--threads", 1, 1024), default=2, metavar="N", help="CPU threads (%(default)s)"
)
PARSER.add_argument("--repeats", type=whole("--repeats", 1), default=5, metavar="N", help="measurements (%(default)s)")
PARSER.add_argument("--compile", action="store_true", help="also PyTorch with torch.compile")
PARSER.add_argument("--others", action="store_true", help="also Mask2Former and EoMT; needs transformers")

PARSER.parse_if_main(__name__)

import functools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tabulate import tabulate

from ..engine import ready_config
from ..errors import optional_package
from ..export import PanopticGraph
from ..speed import compile_model, inference_model, use_precision
from .benchmark import BASELINE, resnet50_body
from .export import OUTPUTS, quiet, to_onnx
from .made_up import MadeUpMerging

Run = Callable[[np.ndarray], object]  # takes an image (H, W, 3), uint8


def in_pytorch(cfg: CfgNode, precision: str, compiled: bool) -> Run:
    """Returns the model as the predictor runs it, with a made-up prediction before merging."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.KMAX.TEST.PRECISION = precision
    model: Any = inference_model(build_model(cfg).eval(), cfg)
    model.postprocessor.merging = MadeUpMerging(model.merging)
    compile_model(model, "default" if compiled else "")

    def run(image: np.ndarray) -> object:
        with use_precision(precision, "cpu"):
            return model([{"image": torch.from_numpy(image).permute(2, 0, 1)}])[0]["panoptic_seg"]

    return run


def in_runtimes(cfg: CfgNode, threads: int, folder: Path) -> Iterator[tuple[str, Run]]:
    """Yields the exported model in ONNX Runtime, and in OpenVINO in float32, bfloat16, and int8."""
    packages = ("onnx", "onnxruntime", "openvino", "nncf")
    onnx, onnxruntime, openvino, nncf = (optional_package(name, "export") for name in packages)
    file = str(folder / "model.onnx")
    cfg = cfg.clone()
    cfg.defrost()
    panoptic = PanopticGraph(inference_model(build_model(cfg).eval(), cfg)).eval()
    with quiet():
        onnx.save(to_onnx(panoptic, torch.zeros(2, 129, 161, 3, dtype=torch.uint8), True, OUTPUTS["panoptic"]), file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options)
    yield "ONNX Runtime, float32", lambda image: session.run(None, {"images": image[None]})
    model = openvino.Core().read_model(file)
    noise = nncf.Dataset([torch.randint(0, 256, (1, 321, 321, 3), dtype=torch.uint8).numpy()])  # for times, as good
    with quiet():
        quantized = nncf.quantize(model, noise, subset_size=1)
    for name, graph, hint in (("float32", model, "f32"), ("bfloat16", model, "bf16"), ("int8", quantized, "f32")):
        hints = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads}
        compiled = openvino.Core().compile_model(graph, "CPU", hints)
        yield f"OpenVINO, {name}", functools.partial(_run_openvino, compiled)


def _run_openvino(compiled: Any, image: np.ndarray) -> object:
    return compiled({"images": image[None]})


def of_others(side: int) -> Iterator[tuple[str, Run]]:
    """Yields Hugging Face's models for panoptic segmentation of square images, as their processors run them."""
    transformers = optional_package("transformers")
    side = side // 32 * 32
    resnet = transformers.ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
    configs = {
        "Mask2Former": transformers.Mask2FormerConfig(backbone_config=resnet, num_labels=133),
        "Eomt": transformers.EomtConfig(image_size=side, num_labels=133),
    }
    for kind, config in configs.items():
        model = getattr(transformers, f"{kind}ForUniversalSegmentation")(config).eval()
        processor = getattr(transformers, f"{kind}ImageProcessor")()
        yield f"{kind} (transformers)", functools.partial(_run_other, model, processor, side)


def _run_other(model: Any, processor: Any, side: int, image: np.ndarray) -> object:
    size = {"height": side, "width": side}
    outputs = model(**processor(images=image, return_tensors="pt", size=size))
    return processor.post_process_panoptic_segmentation(outputs, target_sizes=[image.shape[:2]])


def seconds_of(run: Run, image: np.ndarray) -> float:
    """Times one run."""
    start = time.perf_counter()
    run(image)
    return time.perf_counter() - start


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command line; None takes that of the process."""
    args = PARSER.parse(argv)
    torch.set_num_threads(args.threads)
    off = ("MODEL.DEVICE", "cpu", "MODEL.KMAX.TEST.PAD_TO_CROP", False, "MODEL.WEIGHTS", "")
    cfg = ready_config(args.config_file, args.opts, off)
    with tempfile.TemporaryDirectory() as folder:
        body = resnet50_body().eval()
        runs: dict[str, Run] = {BASELINE: lambda image: body(torch.from_numpy(image).permute(2, 0, 1)[None].float())}
        for precision in ("float32", "bfloat16"):
            runs[f"PyTorch, {precision}"] = in_pytorch(cfg, precision, False)
            if args.compile:
                runs[f"PyTorch compiled, {precision}"] = in_pytorch(cfg, precision, True)
        runs |= dict(in_runtimes(cfg, args.threads, Path(folder)))
        for side in args.sizes:
            runs |= of_others(side) if args.others else {}
            image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
            for run in runs.values():
                run(image)  # compiles, and takes memory
            rounds = [{name: seconds_of(run, image) for name, run in runs.items()} for _ in range(args.repeats)]
            medians = {name: statistics.median(each[name] for each in rounds) for name in runs}
            rows = [(name, each, each / medians[BASELINE]) for name, each in medians.items()]
            print(f"{args.config_file}, {side}×{side}, {args.threads} threads")
            print(tabulate(rows, ("runtime", "seconds", "ratio"), floatfmt=("", ".3f", ".2f"), tablefmt="github"))


if __name__ == "__main__":
    run_program(main)
