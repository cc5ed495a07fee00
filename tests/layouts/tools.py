"""Runs the tools, the demo, and `kmax_d2.load` on a trained checkpoint, in one process, as their command lines do.

python tests/layouts/tools.py CONFIG CHECKPOINT IMAGES OUTPUT [--test-data IMAGES PNGS JSON] [NAME VALUE ...]
"""

import argparse
import importlib.util
import json
import time
from pathlib import Path

import numpy as np
import torch

import kmax_d2
from kmax_d2.images import images_in, read_rgb
from kmax_d2.tools import export, pseudo_label, report, tune_thresholds

DEMO = Path(__file__).parents[2] / "demo" / "demo.py"
EXPORTED_SIZE = 65, 97  # height and width


def main():
    parser = argparse.ArgumentParser()
    for name in ("config", "checkpoint", "images", "output"):
        parser.add_argument(name)
    parser.add_argument("--test-data", nargs=3)
    args, options = parser.parse_known_args()
    output, images = Path(args.output), images_in(Path(args.images))
    data = ["--test-data", *args.test_data] if args.test_data else []
    of_config = ["--config-file", args.config, "--weights", args.checkpoint, *data]
    alone = ["--config-file", args.checkpoint]  # a checkpoint knows its config

    run("report", report.main, [*of_config, "--output", str(output / "report"), "--pictures", "2", *options])
    assert (output / "report" / "report.html").stat().st_size > 10_000
    run("tune_thresholds", tune_thresholds.main, [*of_config, *options])
    run("pseudo_label", pseudo_label.main, [*alone, "--input", args.images, "--output", str(output / "labels")])
    (labels,) = (output / "labels" / "annotations").glob("*.json")
    content = json.loads(labels.read_text())
    assert content["annotations"] and all(entry["segments_info"] for entry in content["annotations"])
    demo = load(DEMO).main
    run("demo", demo, [*alone, "--input", args.images, "--output", str(output / "demo")])
    assert len(list((output / "demo").glob("*.png"))) == len(images)
    run("load", lambda _: check_load(args.checkpoint, images[0], content["categories"]), [])
    file = output / "model.pt2"  # test_export.py has the other formats, which take minutes
    size = ["--size", *map(str, EXPORTED_SIZE)]
    run("export", export.main, [*alone, "--format", "pt2", "--output", str(file), *size])
    run("exported", lambda _: check_export(file, args.checkpoint, images[0]), [])


def run(name, function, arguments):
    start = time.perf_counter()
    function(arguments)
    print(f"ran {name} in {time.perf_counter() - start:.1f} s", flush=True)


def load(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_load(checkpoint, image, categories):
    predict = kmax_d2.load(checkpoint)
    result = predict(str(image))
    assert predict.class_names == [category["name"] for category in categories]
    assert result.panoptic.ids.shape == read_rgb(str(image)).shape[:2]
    assert result.panoptic.segments


def check_export(file, checkpoint, image):
    """The exported graph gives the pixels that the model gives, but for ties that rounding decides."""
    predict = kmax_d2.load(checkpoint, options=["MODEL.KMAX.TEST.PAD_TO_CROP", False, "INPUT.FIT_CROP", False])
    height, width = EXPORTED_SIZE
    pixels = np.resize(read_rgb(str(image)), (height, width, 3))
    ids, _ = torch.export.load(file).module()(torch.from_numpy(pixels[None]))
    expected = predict(pixels).panoptic.ids
    assert (ids[0].numpy() == expected).mean() > 0.99, "the exported model differs"


if __name__ == "__main__":
    main()
