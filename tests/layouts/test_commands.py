"""Every command on every shipped config, in its dataset's real layout; only sizes, counts, and blocks are smaller."""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import write_own_data
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kmax_d2.data.datasets import shapes
from kmax_d2.engine import load_config

from .ade20k import miniature_ade20k
from .cityscapes import miniature_cityscapes
from .coco import miniature_coco, miniature_coconut
from .mapillary import miniature_mapillary

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(
    str(file.relative_to(ROOT / "configs").with_suffix(""))
    for file in (ROOT / "configs").rglob("*.yaml")
    if not file.stem.startswith("base")
)
IN_MAKE_TEST = ("ade20k/r50_641", "camvid/street", "cityscapes/r50", "coco/r50", "coconut/r50", "mapillary/r50")
OF_CUSTOM_DATA = ("camvid/small", "camvid/street")
IMAGES = {  # below DETECTRON2_DATASETS
    "ade20k": "ADEChallengeData2016/images/validation",
    "cityscapes": "cityscapes/leftImg8bit/val/frankfurt",
    "coco": "coco/val2017",
    "coconut": "coco/val2017",
    "mapillary": "mapillary_vistas/validation/images",
    "shapes": f"{shapes.folder(Path()).name}/val",
}
UNAVAILABLE = {"MODEL.WEIGHTS": "", "MODEL.KMAX.TIMM.PRETRAINED": False}  # what the network would bring
# With them, a model that has learned nothing predicts segments: of two queries, one has half of each pixel.
EAGER = {f"MODEL.KMAX.TEST.{kind}_{name}": 0 for kind in ("THING", "STUFF") for name in ("THRESHOLD", "AREA_LIMIT")}


def small_sizes(config):
    """Sizes, counts, and blocks for a config, with which a step takes a second."""
    cfg = load_config(f"configs/{config}.yaml")
    kmax, stages = cfg.MODEL.KMAX, len(cfg.MODEL.KMAX.PIXEL_DECODER.IN_FEATURES)
    sizes = {
        "DATALOADER.NUM_WORKERS": min(1, cfg.DATALOADER.NUM_WORKERS),
        "INPUT.CROP_SIZE": [65, 129],
        "MODEL.KMAX.CONVNEXT.DEPTHS": [1, 1, 1, 1],
        "MODEL.KMAX.CONVNEXT.WIDTHS": [8, 16, 24, 32],
        "MODEL.KMAX.LOSS.NUM_SAMPLES": 64,
        "MODEL.KMAX.MAXS.BLOCKS": [1, 1, 1, 1],
        "MODEL.KMAX.MAXS.WIDTHS": [16, 16, 32, 32],
        "MODEL.KMAX.PIXEL_DECODER.BLOCKS": [1] * stages,
        "MODEL.KMAX.PIXEL_DECODER.WIDTHS": [16, 16, 8, 8, 8][:stages],
        "MODEL.KMAX.RESNET.BLOCKS": [1, 1, 1, 1],
        "MODEL.KMAX.RESNET.WIDTHS": [8, 8, 16, 16],
        "MODEL.KMAX.RESNET.STEM_WIDTH": 8,
        "MODEL.KMAX.SEMANTIC_HEAD.CHANNELS": 16,
        "MODEL.KMAX.SEMANTIC_HEAD.LOW_LEVEL_CHANNELS": [8, 8],
        "MODEL.KMAX.TRANSFORMER_DECODER.CHANNELS": 16,
        "MODEL.KMAX.TRANSFORMER_DECODER.FEATURE_CHANNELS": 8,
        "MODEL.KMAX.TRANSFORMER_DECODER.FFN_CHANNELS": 32,
        "MODEL.KMAX.TRANSFORMER_DECODER.KEY_CHANNELS": 16,
        "MODEL.KMAX.TRANSFORMER_DECODER.NUM_QUERIES": 2,
        "MODEL.KMAX.TRANSFORMER_DECODER.TRAINING_QUERIES": min(1, kmax.TRANSFORMER_DECODER.TRAINING_QUERIES),
        "SOLVER.CHECKPOINT_PERIOD": 2,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": 1000,
        "SOLVER.WARMUP_ITERS": 1,
        "TEST.EVAL_PERIOD": 2,
    }
    if kmax.TIMM.NAME.startswith("vit_base"):
        sizes["MODEL.KMAX.TIMM.NAME"] = kmax.TIMM.NAME.replace("base", "small")
    return sizes


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """A DETECTRON2_DATASETS folder of all datasets."""
    folder = tmp_path_factory.mktemp("datasets")
    makers = miniature_coco, miniature_coconut, miniature_cityscapes, miniature_ade20k, miniature_mapillary
    for make in makers:
        make(folder)
    return folder


@pytest.mark.parametrize("config", CONFIGS)
def test_only_sizes_and_counts_are_changed(config):
    """No feature is switched off: each change is a smaller number, 0 only where the config has 0."""
    cfg = load_config(f"configs/{config}.yaml")
    for name, value in small_sizes(config).items():
        shipped = cfg
        for part in name.split("."):
            shipped = shipped[part]
        if name == "MODEL.KMAX.TIMM.NAME":
            continue
        pairs = [(value, shipped)] if isinstance(value, int) else list(zip(value, shipped, strict=True))
        assert all(type(small) is type(large) is int and (small > 0) == (large > 0) for small, large in pairs) or (
            name == "TEST.EVAL_PERIOD" and shipped == 0
        ), name


def start(config, changes, datasets, log, *arguments, program="train_net.py"):
    """Starts a program in a process group of its own; what it says goes to the file `log`."""
    command = [sys.executable, str(ROOT / program), *map(str, arguments)]
    command += [str(part) for pair in changes.items() for part in pair]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "DETECTRON2_DATASETS": str(datasets),
        "KMAX_D2_CACHE": str(datasets),
    }
    with log.open("w") as stream:
        return subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
        )


def finish(process, log, status=0, timeout=300):
    """What a program has said that ends with the expected status."""
    try:
        found = process.wait(timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    text = log.read_text()
    assert found == status, text[-4000:]
    return text


def wait_for(pattern, folder, process, log, seconds=240):
    """Waits until a running program has written a file."""
    end = time.monotonic() + seconds
    while not list(folder.glob(pattern)):
        assert process.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
        time.sleep(0.05)


def results_in(text):
    """The results that an evaluation has printed, by task and name."""
    found = {}
    for task, names, values in re.findall(r"copypaste: Task: (\S+)\n.*copypaste: (.*)\n.*copypaste: (.*)", text):
        found |= {
            f"{task}/{name}": float(value) for name, value in zip(names.split(","), values.split(","), strict=True)
        }
    return found


def _marks(config):
    group = pytest.mark.xdist_group(config)  # the configs may run in different processes
    return [group] if config in IN_MAKE_TEST else [group, pytest.mark.slow]


@pytest.mark.parametrize("config", [pytest.param(config, marks=_marks(config)) for config in CONFIGS])
def test_every_command(config, datasets, tmp_path):
    output, log, data = tmp_path / "run", tmp_path / "log", []
    if config in OF_CUSTOM_DATA:
        files = write_own_data(tmp_path / "data")
        data, images = ["--train-data", *files["train"], "--test-data", *files["val"]], files["val"][0]
    else:
        images = datasets / IMAGES[config.split("/")[0]]
    arguments = ["--config-file", f"configs/{config}.yaml", *data]
    changes = small_sizes(config) | UNAVAILABLE | {"OUTPUT_DIR": output}

    # Trains beyond the first evaluation until a scheduler stops it, then to the end.
    process = start(config, changes, datasets, log, *arguments)
    try:
        wait_for("inference/*/results.json", output, process, log)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
    finish(process, log, status=75)
    done = int((output / "last_checkpoint").read_text().removeprefix("model_").removesuffix(".pth")) + 1
    changes |= EAGER
    process = start(config, changes | {"SOLVER.MAX_ITER": done + 2}, datasets, log, *arguments, "--resume")
    text = finish(process, log)
    assert f"Starting training from iteration {done}" in text
    latest = check_training(output, done + 2)

    # The same numbers as at the end of the training, and the files for the benchmark's server.
    weights, saved = output / "model_final.pth", tmp_path / "saved"
    alone = changes | {"OUTPUT_DIR": tmp_path / "alone", "MODEL.WEIGHTS": weights}
    process = start(config, alone, datasets, log, *arguments, "--eval-only", "--save-predictions", saved)
    again = results_in(finish(process, log))
    expected = {name: latest[name] for name in again if name in latest}
    assert {"panoptic_seg/PQ", "panoptic_seg/PQ_st"} < expected.keys() and any("sem_seg" in name for name in expected)
    assert {name: again[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    (folder,) = saved.iterdir()
    (json_file,) = folder.glob("*.json")
    predicted = json.loads(json_file.read_text())["annotations"]
    assert len(list((folder / json_file.stem).glob("*.png"))) == len(predicted) > 0
    assert any(annotation["segments_info"] for annotation in predicted)

    # All other commands, on the checkpoint.
    options = {name: value for name, value in changes.items() if name not in ("MODEL.WEIGHTS", "OUTPUT_DIR")}
    test_data = data[data.index("--test-data") :] if data else []
    files = f"configs/{config}.yaml", weights, images, tmp_path / "tools"
    process = start(config, options, datasets, log, *files, *test_data, program="tests/layouts/tools.py")
    text = finish(process, log)
    assert len(re.findall("^ran .* in", text, re.MULTILINE)) == 7


def check_training(output, iterations):
    """The losses are finite, the results are there, and TensorBoard has pictures; returns the latest metrics."""
    latest = {}
    for line in (output / "metrics.json").read_text().splitlines():
        latest |= json.loads(line)
    assert latest["iteration"] == iterations
    losses = {name: value for name, value in latest.items() if "loss" in name}
    assert {"total_loss", "loss_pq_class", "loss_pq_mask", "loss_instance_0", "loss_semantic"} <= losses.keys()
    assert all(map(math.isfinite, losses.values()))
    for name in ("PQ", "PQ_th", "PQ_st"):
        assert 0 <= latest[f"panoptic_seg/{name}"] <= 100
    assert any(name.startswith("sem_seg/") for name in latest)
    events = EventAccumulator(str(output), size_guidance={"images": 0}).Reload()
    assert any(tag.startswith("predictions/") for tag in events.Tags()["images"])
    return latest
