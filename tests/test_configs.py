"""A killed training, and one in two processes, on the benchmarks' layouts of files, through `train_net.py`."""

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
from layouts.ade20k import miniature_ade20k
from layouts.cityscapes import miniature_cityscapes
from layouts.coco import miniature_coco
from small import SMALL_MODEL

ROOT = Path(__file__).parents[1]
SEMANTIC = {"coco": "mIoU", "cityscapes": "IoU", "ade20k": "mIoU"}  # as each benchmark calls it
CONFIGS = sorted(
    f"{benchmark}/{file.stem}"
    for benchmark in SEMANTIC
    for file in (ROOT / "configs" / benchmark).glob("*.yaml")
    if not file.stem.startswith("base")
)
QUERIES = "MODEL.KMAX.TRANSFORMER_DECODER.NUM_QUERIES"
# Of two queries one has half of each pixel: so even a model that has learnt nothing predicts masks.
CHANGES = {
    "DATALOADER.NUM_WORKERS": 0,
    "INPUT.CROP_SIZE": [65, 129],
    "MODEL.DEVICE": "cpu",
    "MODEL.KMAX.TEST.STUFF_AREA_LIMIT": 0,
    "MODEL.KMAX.TEST.STUFF_THRESHOLD": 0.0,
    "MODEL.KMAX.TEST.THING_AREA_LIMIT": 0,
    "MODEL.KMAX.TEST.THING_THRESHOLD": 0.0,
    QUERIES: 2,
    "MODEL.WEIGHTS": "",
    "MODEL.KMAX.TIMM.PRETRAINED": False,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 2,
    "SOLVER.WARMUP_ITERS": 1,
}
SMALL = SMALL_MODEL | CHANGES | {"SEED": 6}  # with which some of them are things
# Its pixel decoder has five stages.
SMALL_CITYSCAPES = SMALL | {
    "MODEL.KMAX.PIXEL_DECODER.WIDTHS": [16, 16, 8, 8, 8],
    "MODEL.KMAX.PIXEL_DECODER.BLOCKS": [1, 1, 1, 1, 1],
}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """A DETECTRON2_DATASETS folder of the three benchmarks; COCO's training images are its unlabeled ones too."""
    folder = tmp_path_factory.mktemp("datasets")
    for make in (miniature_coco, miniature_cityscapes, miniature_ade20k):
        make(folder)
    for name in ("{}2017", "panoptic_{}2017", "annotations/panoptic_{}2017.json"):
        (folder / "coco" / name.format("unlabeled")).symlink_to(folder / "coco" / name.format("train"))
    return folder


def train_net(config, datasets, output, *arguments, changes):
    """A running `train_net.py`, which writes what it says to `output`/log."""
    command = [sys.executable, str(ROOT / "train_net.py"), "--config-file", f"configs/{config}.yaml", *arguments]
    command += [str(part) for pair in (changes | {"OUTPUT_DIR": output}).items() for part in pair]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DETECTRON2_DATASETS": str(datasets)}
    output.mkdir(exist_ok=True)
    with (output / "log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def finish(process, output, timeout=300):
    """What a run that must end well has said."""
    try:
        status = process.wait(timeout)
    finally:
        process.kill()
    said = (output / "log").read_text()
    assert status == 0, said[-3000:]
    return said


def metrics(output):
    """The latest value of everything that a run has written."""
    latest = {}
    for line in (output / "metrics.json").read_text().splitlines():
        latest |= json.loads(line)
    return latest


def printed(said):
    """The results that an evaluation has printed."""
    found = {}
    for task, names, values in re.findall(r"copypaste: Task: (\w+)\n.*copypaste: (.*)\n.*copypaste: (.*)", said):
        found |= {
            f"{task}/{name}": float(value) for name, value in zip(names.split(","), values.split(","), strict=True)
        }
    return found


def check(config, output, said):
    """A run's losses and results are there and finite, the same where they are logged and where they are printed."""
    logged = metrics(output)
    losses = [name for name in logged if "loss" in name]
    assert {"total_loss", "loss_pq_class", "loss_pq_mask_5", "loss_instance_0", "loss_semantic"} <= set(losses)
    semantic = SEMANTIC[config.split("/")[0]]
    results = [f"panoptic_seg/{measure}{kind}" for measure in ("PQ", "SQ", "RQ") for kind in ("", "_th", "_st")]
    results.append(f"sem_seg/{semantic}")
    assert all(math.isfinite(logged[name]) for name in losses + results)
    for name in ("segm/AP", "segm/AP50"):
        # Detectron2 has no AP where there is no instance, which is no fault of a model that knows nothing.
        assert math.isfinite(logged[name]) or "No predictions from the model!" in said
    again = printed(said)
    assert {*results, "segm/AP"} <= set(again)
    assert again == pytest.approx({name: logged[name] for name in again}, abs=1e-4, nan_ok=True)


def test_a_killed_run_is_resumed_and_its_checkpoint_evaluated(datasets, tmp_path):
    config, output = "coco/r50", tmp_path / "run"
    changes = SMALL | {"SOLVER.CHECKPOINT_PERIOD": 2}
    process = train_net(config, datasets, output, changes=changes | {"SOLVER.MAX_ITER": 1000})
    last = output / "last_checkpoint"
    started = time.monotonic()
    while not last.exists() and process.poll() is None and time.monotonic() < started + 120:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert last.exists(), (output / "log").read_text()[-3000:]
    done = int(last.read_text().removeprefix("model_").removesuffix(".pth")) + 1

    process = train_net(config, datasets, output, "--resume", changes=changes | {"SOLVER.MAX_ITER": done + 2})
    said = finish(process, output)
    assert f"Starting training from iteration {done}" in said
    assert metrics(output)["iteration"] == done + 2
    check(config, output, said)

    weights = output / "model_final.pth"
    alone = tmp_path / "alone"
    process = train_net(config, datasets, alone, "--eval-only", changes=changes | {"MODEL.WEIGHTS": weights})
    assert printed(finish(process, alone)) == pytest.approx(printed(said), abs=0, nan_ok=True)


def test_cityscapes_in_two_processes(datasets, tmp_path):
    arguments = "--num-gpus", "2", "--dist-url", "auto"
    process = train_net("cityscapes/r50", datasets, tmp_path, *arguments, changes=SMALL_CITYSCAPES)
    said = finish(process, tmp_path)
    assert "World size: 2" in said
    check("cityscapes/r50", tmp_path, said)
