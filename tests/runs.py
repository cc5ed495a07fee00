"""Real training runs of the small model on a few drawn images, in a process of their own or in this one."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from small import options

from kmax_d2.data.datasets import shapes

ROOT = Path(__file__).parents[1]


def write_own_data(folder):
    """Writes six training and four test images in COCO panoptic format; returns the three files of each part."""
    for split, number, seed in (("train", 6, 3), ("val", 4, 4)):
        shapes.write_split(folder, split, number, seed)
    return {
        split: [str(folder / split), str(folder / f"panoptic_{split}"), str(folder / f"panoptic_{split}.json")]
        for split in ("train", "val")
    }


def train_net(output, own_data, *arguments, **changes):
    """Runs train_net.py on own data and returns the finished process; changes are options, as for `options`."""
    command = [sys.executable, str(ROOT / "train_net.py"), "--train-data", *own_data["train"]]
    command += ["--test-data", *own_data["val"], *arguments]
    command += [str(part) for part in options(OUTPUT_DIR=output, **changes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def arguments(own_data, **changes):
    """Returns a parsed command line with own data, for `setup`; changes are options, as for `options`."""
    return argparse.Namespace(
        config_file="", opts=options(**changes), train_data=own_data["train"], test_data=own_data["val"]
    )
