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


def start_train_net(output, own_data, *arguments, torchrun=0, restarts=0, group=False, **changes):
    """Starts train_net.py on own data, in as many processes of torchrun as given; changes are as for `options`.

    With `group`, its processes are a group of their own.
    """
    command = [sys.executable]
    if torchrun:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(torchrun)]
        command += ["--max-restarts", str(restarts)]
    command += [str(ROOT / "train_net.py"), "--train-data", *own_data["train"], "--test-data", *own_data["val"]]
    command += [*arguments, *(str(part) for part in options(OUTPUT_DIR=output, **changes))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **streams, env=environment, start_new_session=group)


def train_net(output, own_data, *arguments, **changes):
    """Runs :func:`start_train_net` to its end and returns the finished process."""
    process = start_train_net(output, own_data, *arguments, **changes)
    stdout, stderr = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def arguments(own_data, **changes):
    """Returns a parsed command line with own data, for `setup`; changes are options, as for `options`."""
    return argparse.Namespace(
        config_file="", opts=options(**changes), train_data=own_data["train"], test_data=own_data["val"]
    )
