"""What a scheduler, a system short of memory, and a full disk do to a training with all of its processes."""

import copy
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from programs import one_line
from runs import ROOT, arguments, start_train_net, train_net, write_own_data
from small import options as small_options

from kmax_d2.checkpoint import newest_checkpoint
from kmax_d2.engine import Trainer, launch, setup
from kmax_d2.engine.stop import STOPPED
from kmax_d2.errors import UserError


@pytest.fixture(scope="module")
def own_data(tmp_path_factory):
    return write_own_data(tmp_path_factory.mktemp("own"))


def started(output, own_data, *arguments, **changes):
    """A training with workers, in a process group of its own, that has saved a checkpoint."""
    changes = {"SOLVER__MAX_ITER": 100000, "SOLVER__CHECKPOINT_PERIOD": 2, "DATALOADER__NUM_WORKERS": 2} | changes
    process = start_train_net(output, own_data, *arguments, group=True, **changes)
    end = time.monotonic() + 120
    while not (output / "last_checkpoint").exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("options", [(), pytest.param(("--num-gpus", "2"), marks=pytest.mark.slow)])
@pytest.mark.parametrize("period", [3, pytest.param(0, marks=pytest.mark.slow)])
def test_a_signal_to_the_whole_process_group_stops_it_with_a_checkpoint(own_data, tmp_path, options, period):
    """As of scancel, systemd, and timeout: loader workers and evaluation processes get it too."""
    process = started(tmp_path, own_data, *options, TEST__EVAL_PERIOD=period)
    os.killpg(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == STOPPED, stderr
    assert "Traceback" not in stderr
    done = torch.load(newest_checkpoint(tmp_path), weights_only=True)["iteration"] + 1
    resumed = train_net(tmp_path, own_data, "--resume", SOLVER__MAX_ITER=done + 1)
    assert resumed.returncode == 0, resumed.stderr


def test_a_worker_that_the_system_kills_is_one_line(own_data, tmp_path):
    process = started(tmp_path, own_data)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    assert stderr.splitlines()[-1].startswith("error: DataLoader worker (pid")
    assert "Traceback" not in stderr + stdout
    assert torch.load(newest_checkpoint(tmp_path), weights_only=True)["iteration"] >= 1


POOL = """
import multiprocessing, sys
from types import SimpleNamespace
from kmax_d2.engine.stop import StopOnSignal

hook = StopOnSignal()
hook.trainer = SimpleNamespace(save_last_step=lambda: None)
hook.before_train()
for _ in range(10):
    with multiprocessing.get_context("fork").Pool(2) as pool:  # which ends its processes by SIGTERM
        assert pool.map(abs, range(-4, 0)) == [4, 3, 2, 1]
"""


def test_a_pool_of_processes_inside_a_training_ends():
    subprocess.run([sys.executable, "-c", POOL], check=True, timeout=120)


def test_a_launch_that_cannot_work_is_one_line_at_once():
    def line(**changes):
        arguments = {"num_gpus_per_machine": 1, "num_machines": 2, "machine_rank": 0, "dist_url": "tcp://a:29500"}
        return one_line(lambda: launch(print, **arguments | changes))

    assert "--machine-rank is 5, but must be from 0 to 0" in line(num_machines=1, machine_rank=5)
    assert "--machine-rank is -1, but must be from 0 to 1" in line(machine_rank=-1)
    for url in ("garbage", "tcp://", "tcp://host", "tcp://host:port", "tcp://host:0", "tcp://host:70000", "http://a:1"):
        assert f"--dist-url is {url}, but must be" in line(dist_url=url)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files")
def test_a_full_disk_is_one_line_and_earlier_checkpoints_stay(own_data, tmp_path):
    """Files that may not grow further fail as on a full disk, log and TensorBoard's events too."""
    first = train_net(tmp_path, own_data, SOLVER__MAX_ITER=1)
    assert first.returncode == 0, first.stderr
    before = (tmp_path / "model_final.pth").read_bytes()
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000)); "
    limit += "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    files = ["--train-data", *own_data["train"], "--test-data", *own_data["val"]]
    command = [sys.executable, "-c", limit, str(ROOT / "train_net.py"), "--resume", *files]
    command += map(str, small_options(OUTPUT_DIR=tmp_path, SOLVER__MAX_ITER=3, SOLVER__CHECKPOINT_PERIOD=1))
    full = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert full.returncode == 1
    assert full.stderr.splitlines()[-1].startswith(f"error: cannot write {tmp_path}/model_0000001.pth: File too large")
    assert "Traceback" not in full.stderr + full.stdout
    assert (tmp_path / "model_final.pth").read_bytes() == before
    assert not list(tmp_path.glob(".*.part*"))
    resumed = train_net(tmp_path, own_data, "--resume", SOLVER__MAX_ITER=2)
    assert resumed.returncode == 0, resumed.stderr


@pytest.mark.parametrize("content", [b"", b"\0" * 40, b"\xff\xfe", b"n" * 5000, b"../../etc/passwd", b"absent.pth\n"])
def test_a_broken_note_of_the_last_checkpoint_is_passed_over(tmp_path, content):
    torch.save({"model": {}}, tmp_path / "model_0000003.pth")
    (tmp_path / "last_checkpoint").write_bytes(content)
    assert newest_checkpoint(tmp_path) == str(tmp_path / "model_0000003.pth")


def spoiled(*path, value):
    """A change of a training state at a path of keys."""

    def change(state):
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return change


LOOP = "trainer", "_trainer"
MOMENTS = *LOOP, "optimizer", "state", 0, "exp_avg"


def test_training_states_that_do_not_fit_are_one_line(own_data, tmp_path):
    cfg = setup(arguments(own_data, OUTPUT_DIR=str(tmp_path), SOLVER__MAX_ITER=1))
    trainer = Trainer(cfg)
    trainer.train()
    good = torch.load(tmp_path / "model_final.pth", weights_only=True)
    for change in [
        spoiled(*MOMENTS, value=torch.zeros(2)),
        spoiled(*LOOP, "optimizer", "param_groups", value=[]),
        spoiled(*LOOP, value=3),
        spoiled("trainer", value="text"),
        spoiled("trainer", "iteration", value="many"),
        spoiled("trainer", "hooks", value=7),
    ]:
        state = copy.deepcopy(good)
        change(state)
        torch.save(state, tmp_path / "model_final.pth")
        with pytest.raises(UserError, match="cannot resume"):
            Trainer(cfg).resume_or_load(resume=True)
