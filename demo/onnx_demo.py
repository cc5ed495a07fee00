#!/usr/bin/env python
"""Segments an image with a file of `python -m kmax_d2.tools.export --format onnx`, without PyTorch or Detectron2.

python demo/onnx_demo.py MODEL.onnx IMAGE OUTPUT.png [--size HEIGHT WIDTH] [--overwrite]
"""

import argparse
import colorsys
import io
import os
import sys
from collections.abc import Sequence

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def segment(model: str, image: Image.Image, size: Sequence[int] | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns segment ids (H, W), 0 for void, and for each id, from 1, its class, score, and area in pixels.

    Args:
        model: the exported file.
        image: RGB.
        size: (height, width) at which the model runs; None for the size that was exported, else the image's.
    """
    session = onnxruntime.InferenceSession(model, providers=onnxruntime.get_available_providers())
    height, width = session.get_inputs()[0].shape[1:3]
    if size is None and isinstance(height, int):
        size = height, width
    resized = image if size is None else image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    ids, segments = session.run(None, {"images": np.asarray(resized)[None]})
    ids = np.asarray(Image.fromarray(ids[0]).resize(image.size, Image.Resampling.NEAREST))
    return ids, segments[0]


def write(file: str, content: bytes) -> None:
    """Writes a file whole or, on a full disk for example, not at all."""
    unfinished = f"{file}.part"
    try:
        with open(unfinished, "wb") as stream:
            stream.write(content)
        os.replace(unfinished, file)
    finally:
        if os.path.exists(unfinished):
            os.unlink(unfinished)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command line; None takes that of the process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "image", "output"):
        parser.add_argument(name)
    parser.add_argument("--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="at which the model runs")
    parser.add_argument("--overwrite", action="store_true", help="write over a file that exists")
    args = parser.parse_args(argv)
    try:
        inputs = [file for file in (args.image, args.model) if os.path.exists(file) and os.path.exists(args.output)]
        is_input = any(os.path.samefile(args.output, file) for file in inputs)
        if os.path.exists(args.output) and (is_input or not args.overwrite):
            raise FileExistsError(f"{args.output} exists: choose another name, or add --overwrite")
        if Image.registered_extensions().get(os.path.splitext(args.output)[1].lower()) not in Image.SAVE:
            raise ValueError(f"{args.output} must end as a picture does, such as .png")
        image = Image.open(args.image)
        if image.mode == "F" or image.mode.startswith("I"):  # Pillow would clip the values at 255
            raise ValueError(f"{args.image} has more than 8 bits per channel; convert it to 8 bits first")
        image = ImageOps.exif_transpose(image).convert("RGB")
        ids, segments = segment(args.model, image, args.size)
        hues = (np.arange(len(segments)) * 0.618) % 1  # the golden ratio keeps neighbors apart
        colors = np.array([(0, 0, 0), *(colorsys.hsv_to_rgb(hue, 0.8, 1) for hue in hues)]) * 255
        picture = io.BytesIO()
        overlay = Image.fromarray((0.5 * np.asarray(image) + 0.5 * colors[ids]).astype(np.uint8))
        overlay.save(picture, Image.registered_extensions()[os.path.splitext(args.output)[1].lower()])
        write(args.output, picture.getvalue())
    except Exception as error:  # the runtime's own are of no other kind
        sys.exit(f"error: {' '.join(str(error).split()) or type(error).__name__}")
    for number, (class_id, score, area) in enumerate(segments, start=1):
        if area > 0:
            print(f"segment {number}: class {class_id:.0f}, score {score:.2f}, {area:.0f} pixels")


if __name__ == "__main__":
    main()
