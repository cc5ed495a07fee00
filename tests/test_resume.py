"""A run that was interrupted goes on as if nothing had happened; some of the interruptions are real."""

import functools
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import programs
import pytest
import small
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from runs import ROOT, arguments, start_train_net, train_net, write_own_data
from torch.multiprocessing.spawn import ProcessRaisedException

from kmax_d2.checkpoint import newest_checkpoint
from kmax_d2.engine import Trainer, launch, setup
from kmax_d2.engine.stop import SAME, STOPPED, StopOnSignal
from kmax_d2.errors import UserError
from kmax_d2.files import lock_folder

STEPS, BREAK = 4, 2


@pytest.fixture(scope="module")
def own_data(tmp_path_factory):
    return write_own_data(tmp_path_factory.mktemp("own"))


def loaded(file):
    return torch.load(file, map_location="cpu", weights_only=True)


def assert_same(one, other, name="checkpoint"):
    """Compares nested training states bit by bit."""
    assert type(one) is type(other), name
    if isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key in one:
            assert_same(one[key], other[key], f"{name}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), name
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{name}[{index}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), name
    else:
        assert one == other, name


def run(own_data, folder, **changes):
    """Trains in this process, resuming what the folder has; returns the losses by iteration."""
    changes = {"SOLVER__MAX_ITER": STEPS, "SOLVER__CHECKPOINT_PERIOD": BREAK} | changes
    seed_all_rng(1)
    trainer = Trainer(setup(arguments(own_data, OUTPUT_DIR=str(folder), **changes)))
    trainer.resume_or_load(resume=True)
    trainer.train()
    return {step: loss for loss, step in trainer.storage.history("total_loss").values()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"DATALOADER__NUM_WORKERS": 1, "SEED": -1, "SOLVER__EMA__ENABLED": True},
        {"DATALOADER__NUM_WORKERS": 2, "INPUT__COPY_PASTE": False, "SOLVER__ACCUMULATE": 2},
    ],
    ids=["plain", "seed drawn, averaged", "two workers, in parts"],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit(own_data, tmp_path, changes):
    changes |= {"MODEL__KMAX__TRANSFORMER_DECODER__DROP_PATH": 0.3}
    whole = run(own_data, tmp_path / "whole", **changes)
    (tmp_path / "resumed").mkdir()
    shutil.copy(tmp_path / "whole" / f"model_{BREAK - 1:07d}.pth", tmp_path / "resumed")
    rest = run(own_data, tmp_path / "resumed", **changes)
    assert list(rest) == [2, 3]
    assert rest.items() <= whole.items()
    assert_same(*(loaded(tmp_path / name / "model_final.pth") for name in ("whole", "resumed")))


@pytest.mark.slow
def test_two_processes_resume_bit_by_bit(own_data, tmp_path):
    (tmp_path / "resumed").mkdir()
    for name in ("whole", "resumed"):
        changes = {"SOLVER__MAX_ITER": STEPS, "SOLVER__CHECKPOINT_PERIOD": BREAK, "DATALOADER__NUM_WORKERS": 1}
        done = train_net(tmp_path / name, own_data, "--num-gpus", "2", "--resume", **changes)
        assert done.returncode == 0, done.stderr
        if name == "whole":
            shutil.copy(tmp_path / "whole" / f"model_{BREAK - 1:07d}.pth", tmp_path / "resumed")
    assert f"Starting training from iteration {BREAK}" in done.stdout
    assert_same(*(loaded(tmp_path / name / "model_final.pth") for name in ("whole", "resumed")))


def test_workers_do_not_change_the_run(own_data, tmp_path):
    losses = [run(own_data, tmp_path / str(n), DATALOADER__NUM_WORKERS=n, SOLVER__MAX_ITER=3) for n in (0, 2)]
    assert losses[0] == losses[1]


def test_another_batch_size_goes_on_with_the_next_samples(own_data, tmp_path):
    def order(loader, number):
        batches = (batch for batch, _ in zip(loader, range(number), strict=False))
        return [sample["file_name"] for batch in batches for sample in batch]

    run(own_data, tmp_path, SOLVER__MAX_ITER=1)
    changes = {"OUTPUT_DIR": str(tmp_path), "SOLVER__IMS_PER_BATCH": 1}
    trainer = Trainer(setup(arguments(own_data, **changes)))
    every = order(trainer._trainer.data_loader, 6)
    trainer.resume_or_load(resume=True)
    assert order(trainer._trainer.data_loader, 4) == every[2:]


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)


def interrupted(own_data, folder, *options, number):
    """Starts a run, sends it a signal, twice, as some senders do, after its first checkpoint; returns its status."""
    process = start_train_net(folder, own_data, *options, SOLVER__MAX_ITER=500, SOLVER__CHECKPOINT_PERIOD=1)
    try:
        wait_for(lambda: list(Path(folder).glob("model_*.pth")), process)
        for _ in range(2):
            process.send_signal(number)
            time.sleep(0.1)
        process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode


def test_a_signal_ends_the_run_with_a_checkpoint_and_a_status_of_its_own(own_data, tmp_path):
    assert interrupted(own_data, tmp_path, number=signal.SIGTERM) == STOPPED
    steps = loaded(newest_checkpoint(tmp_path))["iteration"] + 3
    assert list(run(own_data, tmp_path, SOLVER__MAX_ITER=steps)) == [steps - 2, steps - 1]


class DoBefore(HookBase):
    """Does something before a step, in the last process."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def before_step(self):
        if self.trainer.iter == self.step and comm.get_rank() == comm.get_world_size() - 1:
            self.action()


def make_a_mistake():
    raise ZeroDivisionError("a mistake in a module")


def run_to_an_error(own_data, folder, step, action):
    seed_all_rng(1)
    trainer = Trainer(setup(arguments(own_data, OUTPUT_DIR=str(folder), SOLVER__MAX_ITER=STEPS)))
    trainer.register_hooks([DoBefore(step, action)])
    trainer.train()


@pytest.mark.parametrize("done", [0, BREAK])
@pytest.mark.parametrize("of_the_user", [True, False])
def test_an_error_ends_the_run_with_a_checkpoint_of_its_last_step(tmp_path, done, of_the_user):
    own_data = write_own_data(tmp_path)
    if done:
        run(own_data, tmp_path / "whole")
    vanish = functools.partial((tmp_path / "train").rename, tmp_path / "gone")
    kind, message = (UserError, "cannot read the image") if of_the_user else (ZeroDivisionError, "a mistake")
    with pytest.raises(kind, match=message):
        run_to_an_error(own_data, tmp_path / "broken", done, vanish if of_the_user else make_a_mistake)
    names = [f"model_{BREAK - 1:07d}.pth"] if done else []
    assert [file.name for file in (tmp_path / "broken").glob("*.pth")] == names
    for name in names:
        assert_same(*(loaded(tmp_path / folder / name) for folder in ("whole", "broken")))


@pytest.mark.slow
def test_an_error_in_another_process_too(own_data, tmp_path):
    with pytest.raises(ProcessRaisedException, match="a mistake"):
        launch(run_to_an_error, 2, dist_url="auto", args=(own_data, tmp_path, BREAK, make_a_mistake))
    assert [file.name for file in tmp_path.glob("*.pth")] == [f"model_{BREAK - 1:07d}.pth"]


def refusal(own_data, folder, *options, **changes):
    """Returns the one line with which train_net.py refuses to run, in this process."""
    changes = {"OUTPUT_DIR": str(folder), "MODEL__WEIGHTS": ""} | changes
    with pytest.raises(UserError) as refused:
        program = programs.load(programs.TRAIN_NET)
        files = ("--train-data", *own_data["train"], "--test-data", *own_data["val"])
        program.main([*files, *options, *map(str, small.options(**changes))])
    return str(refused.value)


def test_a_run_is_not_started_over_another_one_nor_without_what_it_needs(own_data, tmp_path, monkeypatch):
    assert "evaluates the last checkpoint, but" in refusal(own_data, tmp_path, "--eval-only", "--resume")
    assert "needs MODEL.WEIGHTS" in refusal(own_data, tmp_path, "--eval-only")
    run(own_data, tmp_path / "finished", SOLVER__MAX_ITER=1)
    assert "continue it with --resume" in refusal(own_data, tmp_path / "finished")
    lock_folder(tmp_path / "in use")
    assert "another run writes to" in refusal(own_data, tmp_path / "in use")
    assert "must be at least 1" in refusal(own_data, tmp_path, "--num-gpus", "0")
    assert "--num-machines needs --dist-url" in refusal(own_data, tmp_path, "--num-machines", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert "leave out --num-gpus" in refusal(own_data, tmp_path, "--num-gpus", "2")


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_to_the_launcher_ends_both_processes(own_data, tmp_path, number):
    assert interrupted(own_data, tmp_path, "--num-gpus", "2", number=number) == STOPPED
    assert subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True).stdout == ""
    assert loaded(newest_checkpoint(tmp_path))["iteration"] >= 0


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_resumes(own_data, tmp_path, processes):
    assert interrupted(own_data, tmp_path, "--num-gpus", str(processes), number=signal.SIGKILL) == -signal.SIGKILL
    time.sleep(5)
    assert subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True).stdout == ""
    steps = loaded(newest_checkpoint(tmp_path))["iteration"] + 3
    run = train_net(tmp_path, own_data, "--resume", "--num-gpus", str(processes), SOLVER__MAX_ITER=steps)
    assert run.returncode == 0, run.stderr
    assert loaded(tmp_path / "model_final.pth")["iteration"] == steps - 1
    assert not list(tmp_path.glob(".*.part*"))


def test_torchrun_trains_once_in_two_processes(own_data, tmp_path):
    run = train_net(tmp_path, own_data, torchrun=2, SOLVER__MAX_ITER=2)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("Starting training from iteration 0") == 1
    state = loaded(tmp_path / "model_final.pth")["trainer"]["_trainer"]
    assert state["samples"] == 4


def damage(file):
    file.write_bytes(file.read_bytes()[:-100])


def test_resuming_goes_back_to_the_newest_whole_checkpoint(own_data, tmp_path, caplog):
    run(own_data, tmp_path, SOLVER__MAX_ITER=2, SOLVER__CHECKPOINT_PERIOD=1)
    damage(tmp_path / "model_final.pth")
    assert newest_checkpoint(tmp_path) == str(tmp_path / "model_0000001.pth")
    assert "model_final.pth is missing or damaged: going back to" in caplog.text
    (tmp_path / "last_checkpoint").write_text("")
    assert newest_checkpoint(tmp_path) == str(tmp_path / "model_0000001.pth")
    (tmp_path / "last_checkpoint").write_text("../../model_0000000.pth")
    assert newest_checkpoint(tmp_path) == str(tmp_path / "model_0000000.pth")
    for file in tmp_path.glob("model_*.pth"):
        damage(file)
    with pytest.raises(UserError, match=r"neither model_.* nor an earlier one"):
        newest_checkpoint(tmp_path)


def test_old_checkpoints_are_removed_where_asked_for(own_data, tmp_path):
    run(own_data, tmp_path, SOLVER__MAX_ITER=4, SOLVER__CHECKPOINT_PERIOD=1, SOLVER__KEEP_CHECKPOINTS=2)
    kept = sorted(file.name for file in tmp_path.glob("*.pth"))
    assert kept == ["model_0000002.pth", "model_0000003.pth", "model_final.pth"]


def test_another_number_of_classes_cannot_be_resumed(own_data, tmp_path):
    run(own_data, tmp_path, SOLVER__MAX_ITER=1)
    state = loaded(tmp_path / "model_final.pth")
    name = "transformer_decoder.predictor.class_head.bias"
    state["model"][name] = state["model"][name][1:]
    torch.save(state, tmp_path / "model_final.pth")
    with pytest.raises(UserError, match=r"class_head.bias has shape \(9,\), not \(10,\)"):
        run(own_data, tmp_path)


@pytest.mark.slow
def test_torchrun_restarts_a_killed_process_from_the_last_checkpoint(own_data, tmp_path):
    process = start_train_net(
        tmp_path, own_data, "--resume", torchrun=2, restarts=3, SOLVER__MAX_ITER=40, SOLVER__CHECKPOINT_PERIOD=5
    )
    try:
        wait_for(lambda: list(tmp_path.glob("model_0*.pth")), process)
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(children[-1]), signal.SIGKILL)
        stdout, stderr = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, stderr
    starts = [int(number) for number in re.findall(r"Starting training from iteration (\d+)", stdout)]
    assert len(starts) == 2 and starts[0] == 0 and starts[1] % 5 == 0 < starts[1]
    assert loaded(tmp_path / "model_final.pth")["iteration"] == 39


# What SLURM's commands do, as far as the script can see: tasks on two nodes, which are both this machine.
SRUN = """#!/bin/bash
for SLURM_NODEID in 0 1; do
    export SLURM_NODEID
    "$@" &
    tasks="$tasks $!"
done
trap 'kill -USR1 $tasks' USR1
for task in $tasks; do
    while wait $task; code=$?; [ $code -gt 128 ] && kill -0 $task 2>/dev/null; do :; done
done
exit $code
"""
SCONTROL = """#!/bin/bash
if [ $1 = show ]; then echo 127.0.0.1; else echo "$@" > "$(dirname "$0")/requeued"; fi
"""


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_the_slurm_script_of_the_docs_requeues_a_preempted_run(own_data, tmp_path, nodes):
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "cluster.md").read_text(), re.DOTALL)
    script, several = (block for block in blocks if block.startswith("#"))
    files = shlex.join(["--train-data", *own_data["train"], "--test-data", *own_data["val"]])
    options = small.options(OUTPUT_DIR=tmp_path / "out", SOLVER__MAX_ITER=500, SOLVER__CHECKPOINT_PERIOD=1)
    if nodes == 2:
        script = re.sub(r"\npython .*\n", lambda _: f"\n{several}", script)
    for told, small_run in {
        "python train_net.py --config-file coco/r50": f"{sys.executable} {ROOT / 'train_net.py'} {files}",
        "--num-gpus 8": "--num-gpus 1",
        "OUTPUT_DIR output/r50": shlex.join(map(str, options)),
    }.items():
        assert told in script
        script = script.replace(told, small_run)
    for name, program in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(program)
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[0-1]"}
    environment = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(["bash", "-c", script], env=environment, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: list((tmp_path / "out").glob("model_*.pth")), process)
        process.send_signal(signal.SIGUSR1)
        process.communicate(timeout=120)
    finally:
        process.kill()
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    assert subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True).stdout == ""


def test_a_second_signal_ends_the_process_at_once_unless_it_is_the_same_one_again():
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        hook = StopOnSignal()
        hook.before_train()
        hook.before_step()
        for pause in (0, 0, SAME):
            time.sleep(pause)
            os.kill(os.getpid(), signal.SIGTERM)
            os.write(writing, b".")
        os._exit(0)
    os.close(writing)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    with os.fdopen(reading) as survived:
        assert survived.read() == ".."


@pytest.mark.slow
def test_processes_that_do_not_meet_give_up():
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(UserError, match=r"did not meet at tcp://127\.0\.0\.1:\d+: .*1/2 clients joined"):
        launch(print, 1, num_machines=2, machine_rank=0, dist_url=address, timeout=timedelta(seconds=1))
