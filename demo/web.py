#!/usr/bin/env python
"""Shows what a model finds in images, and how its clusters form, on a web page of this computer.

Without --config-file, it starts with coco/r50 and its published weights, or the included model if they are unavailable.
"""

import sys
from collections.abc import Sequence

PARSES_FIRST = True  # read by kmax_d2, which then does not import PyTorch yet

from kmax_d2.command_line import ConfigParser, run_program

PARSER = ConfigParser(__doc__, config_file=False, weights=True, options="--opts")
PARSER.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 is all (%(default)s)")
PARSER.add_argument("--port", type=int, default=7860, help="port to listen at (%(default)s)")

PARSER.parse_if_main(__name__)

import functools
import json
import os
import signal
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch

from kmax_d2 import model_zoo
from kmax_d2.errors import UserError, optional_package
from kmax_d2.evaluation.rle import encode_masks
from kmax_d2.images import read_rgb, read_size
from kmax_d2.inference import Predictor, Result, Segment, load
from kmax_d2.visualization import cluster_panels

MAX_BYTES = 20_000_000  # of an upload
MAX_PIXELS = 50_000_000  # of an upload
LONG_SIDE = 1280  # pixels; larger images are reduced, which bounds time and the memory of a visitor
MAX_VISITORS = 16  # whose last results are kept
MAX_WAITING = 16  # images
KEPT = 600  # seconds until uploads and results are deleted
KINDS = ("panoptic", "instances", "semantic")


class View(NamedTuple):
    """A result as the page needs it: the id map (H, W), its segments, and the titled pictures of all decoders.

    The pictures are `scale` times as large as the id map.
    """

    ids: np.ndarray
    segments: list[Segment]
    scale: float
    clusters: list[tuple[str, np.ndarray]]


def read_upload(file: str) -> np.ndarray:
    """Reads an uploaded image: RGB (H, W, 3), uint8, at most LONG_SIDE wide and high.

    Raises UserError, which does not name the file, if it is broken or has more than MAX_PIXELS.
    """
    try:
        height, width = read_size(file)
        if height * width > MAX_PIXELS:
            raise UserError(f"the image has {height} by {width} pixels; at most {MAX_PIXELS:,} in all are allowed")
        image = read_rgb(file)
    except UserError as error:
        raise UserError(str(error).replace(file, "that you sent")) from None
    scale = LONG_SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA) if scale < 1 else image


def describe(view: View, x: int, y: int) -> str:
    """Returns class, score, and area of the segment at a point (x, y) of a picture."""
    rows, columns = view.ids.shape
    id_ = view.ids[min(int(y / view.scale), rows - 1), min(int(x / view.scale), columns - 1)]
    for number, segment in enumerate(view.segments, start=1):
        if segment.id == id_:
            kind = "thing" if segment.is_thing else "stuff"
            area = f"{segment.area:,} pixels ({segment.area / view.ids.size:.1%})"
            return f"{segment.class_name} ({kind}, segment {number}): score {segment.score:.2f}, {area}"
    return "no segment here: the model is not sure"


def to_json(result: Result) -> str:
    """Returns the segments of a result as in COCO's panoptic JSON, with class names and run-length encoded masks."""
    ids, segments = result.panoptic
    masks = torch.from_numpy(ids == np.array([s.id for s in segments], dtype=ids.dtype).reshape(-1, 1, 1))
    parts = zip(segments, result.to_coco()["segments_info"], encode_masks(masks), strict=True)
    infos = [info | {"category": s.class_name, "segmentation": rle} for s, info, rle in parts]
    return json.dumps({"height": ids.shape[0], "width": ids.shape[1], "segments_info": infos}, indent=1)


def segment(predict: Predictor, file: str) -> tuple[View, list[np.ndarray], str]:
    """Segments an uploaded image: what the page keeps of it, the pictures of KINDS, and the JSON. Raises UserError."""
    result = predict(read_upload(file))
    size = predict.mapper.inputs(result.image)["image"].shape[-2:]
    pictures = [result.draw(kind) for kind in KINDS]
    scale = pictures[0].shape[0] / result.image.shape[0]
    view = View(*result.panoptic, scale, cluster_panels(result.image, result.clusters, size))
    return view, pictures, to_json(result)


class Models:
    """The models to choose from by `names`: all with trained weights, and the first, whose name is the `default`."""

    def __init__(self, first: Predictor):
        self.first, weights = first, first.cfg.MODEL.WEIGHTS
        known = {weights: name for name, weights in model_zoo.WEIGHTS.items()}
        self.default = known.get(weights, Path(weights).name)
        self.names = sorted({self.default, *known.values()})
        self._load = functools.lru_cache(maxsize=1)(load)  # one besides the first, for the memory

    def __call__(self, name: str) -> Predictor:
        """Returns a model. Raises UserError, without a path of this computer, if its weights cannot be had."""
        try:
            return self.first if name == self.default else self._load(name)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            raise UserError(f"the weights of {name} cannot be downloaded now: choose another model") from None


def build_page(models: Models) -> Any:
    """Returns the page, gradio's Blocks."""
    import gradio as gr

    def show(name: str, file: str | None) -> list:
        if not file:
            return [None] * 7 + [gr.Slider(interactive=False)]
        try:
            view, pictures, text = segment(models(name), file)
        except UserError as error:
            raise gr.Error(f"{str(error)[0].upper()}{str(error)[1:]}.", print_exception=False) from None
        step = gr.Slider(1, len(view.clusters), value=1, interactive=True)
        return [view, *pictures, text, "", slide(view, 1), step]

    def slide(view: View | None, step: float) -> Any:
        title, picture = view.clusters[int(step) - 1] if view else ("clusters", None)
        return gr.Image(picture, label=title.capitalize())

    def click(view: View | None, event: gr.SelectData) -> str:
        return describe(view, *event.index) if view else ""

    with gr.Blocks(title="kMaX-DeepLab", analytics_enabled=False, delete_cache=(60, KEPT)) as page:
        view = gr.State(time_to_live=KEPT)
        gr.Markdown("# kMaX-DeepLab\nEvery decoder assigns each pixel to its nearest cluster center, as k-means does.")
        with gr.Row():
            with gr.Column(scale=1):
                name = gr.Dropdown(models.names, value=models.default, label="Model")
                image = gr.Image(type="filepath", label="Image", buttons=[], elem_id="input")
                image.preprocess = lambda payload: payload and payload.path  # gradio would fail on a broken image
                chosen = gr.Textbox(label="Click a segment of a picture", interactive=False, elem_id="chosen")
            with gr.Column(scale=2):
                pictures = []
                for kind in KINDS:
                    with gr.Tab(kind.capitalize()):
                        pictures.append(gr.Image(format="png", interactive=False, show_label=False))
                step = gr.Slider(1, 7, 1, step=1, label="Decoder", interactive=False, elem_id="step", buttons=[])
                clusters = gr.Image(format="jpeg", interactive=False, label="Clusters", elem_id="clusters", buttons=[])
        with gr.Accordion("Segments as JSON, with COCO's run-length encoded masks", open=False):
            text = gr.Code(language="json", elem_id="json", max_lines=20, buttons=["copy", "download"])

        options = {"api_visibility": "private", "concurrency_limit": 1}
        outputs = [view, *pictures, text, chosen, clusters, step]
        gr.on([image.input, name.input], show, [name, image], outputs, **options)
        step.change(slide, [view, step], clusters, trigger_mode="always_last", show_progress="hidden", **options)
        for picture in pictures:
            picture.select(click, view, chosen, **options)
    return page.queue(max_size=MAX_WAITING)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command line; None takes that of the process."""
    args = PARSER.parse(argv)
    with tempfile.TemporaryDirectory(prefix="kmax_d2-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # where gradio keeps uploads and results
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        optional_package("gradio", "web")  # fails before the model is loaded
        page = build_page(Models(load(args.config_file or "", options=args.opts)))
        limits = {"max_file_size": MAX_BYTES, "state_session_capacity": MAX_VISITORS}
        try:
            page.launch(
                server_name=args.host, server_port=args.port, share=False, ssr_mode=False, footer_links=[], **limits
            )
        except (OSError, OverflowError):
            raise UserError(
                f"cannot listen at {args.host}, port {args.port}: choose another --host or --port"
            ) from None


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # uploads are deleted then too
    run_program(main)
