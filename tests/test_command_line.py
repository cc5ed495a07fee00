"""The command-line grammar of all programs, and that parsing does not wait for PyTorch."""

import argparse
import os
import signal
from pathlib import Path

import programs
import pytest
from programs import DEMO, ROOT, run

from kmax_d2.command_line import ConfigParser
from kmax_d2.errors import UserError

TOOLS = sorted(
    file.stem for file in (ROOT / "kmax_d2" / "tools").glob("*.py") if "__main__" in file.read_text(encoding="utf-8")
)
PROGRAMS = [*(["-m", f"kmax_d2.tools.{name}"] for name in TOOLS), [str(DEMO)]]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: Path(program[-1]).name)
def test_help_does_not_import_pytorch(program):
    assert len(PROGRAMS) >= 8
    done = run("-X", "importtime", *program, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:") and ("NAME VALUE" in done.stdout or "SOURCE" in done.stdout)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "argparse" in imported and "kmax_d2" in imported
    assert not imported & {"torch", "detectron2", "numpy"}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: Path(program[-1]).name)
def test_mistakes_do_not_import_pytorch_either(program):
    done = run("-X", "importtime", *program, "--no-such-flag")
    assert done.returncode == 2
    assert "--no-such-flag" in done.stderr or "required" in done.stderr
    assert not any(line.endswith(" torch") for line in done.stderr.splitlines())


def test_importing_the_package_registers_everything():
    code = (
        "import kmax_d2\n"
        "from detectron2.data import DatasetCatalog\n"
        "from detectron2.modeling import META_ARCH_REGISTRY\n"
        "assert 'shapes_train' in DatasetCatalog and 'KMaXDeepLab' in META_ARCH_REGISTRY\n"
        "kmax_d2.add_kmax_config, kmax_d2.model_zoo\n"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_other_modules_that_run_register_everything(tmp_path):
    """Also a package that imports kmax_d2 and is run with -m itself."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "__init__.py").write_text("import kmax_d2\n")
    (tmp_path / "own" / "main.py").write_text("import sys, kmax_d2\nprint(kmax_d2.add_kmax_config, sys.argv[1:])\n")
    done = run("-m", "own.main", "kmax_d2.tools.analyze", PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert done.returncode == 0, done.stderr
    assert "add_kmax_config" in done.stdout


def parser():
    built = ConfigParser("A program.", weights=True)
    built.add_argument("input")
    built.add_argument("--size", type=int)
    return built


@pytest.mark.parametrize(
    "line",
    [
        "in.png --config-file coco/r50 --size 3 SOLVER.BASE_LR -1 MODEL.DEVICE cpu",
        "--config-file coco/r50 in.png SOLVER.BASE_LR -1 MODEL.DEVICE cpu --size 3",
        "in.png SOLVER.BASE_LR -1 --size 3 MODEL.DEVICE cpu --config-file coco/r50",
    ],
)
def test_options_may_stand_anywhere(line):
    args = parser().parse(line.split())
    assert args.opts == ["SOLVER.BASE_LR", "-1", "MODEL.DEVICE", "cpu"]
    assert (args.input, args.size, args.config_file, args.weights) == ("in.png", 3, "coco/r50", None)


def test_weights_are_an_option_too():
    args = parser().parse(["in.png", "--config-file", "coco/r50", "--weights", "a.pth", "MODEL.DEVICE", "cpu"])
    assert args.opts == ["MODEL.WEIGHTS", "a.pth", "MODEL.DEVICE", "cpu"]


def test_options_after_their_flag_leave_lists_alone():
    built = ConfigParser("A program.", config_file=False, options="--opts")
    built.add_argument("--input", nargs="+")
    args = built.parse(["--input", "a", "b", "--opts", "MODEL.DEVICE", "cpu", "--config-file", "x"])
    assert (args.input, args.opts, args.config_file) == (["a", "b"], ["MODEL.DEVICE", "cpu"], "x")
    assert built.parse(["--input", "c"]).opts == []  # which is a new list
    assert ConfigParser("", config_file=None).parse([]) == argparse.Namespace(opts=[])


@pytest.fixture(scope="module")
def train_net():
    return programs.load(programs.TRAIN_NET)


@pytest.mark.parametrize("after", [False, True])
def test_training_takes_our_arguments_before_and_after_options(train_net, after):
    ours = ["--save-predictions", "there", "--test-data", "images", "pngs", "json"]
    options = ["MODEL.DEVICE", "cpu"]
    args = train_net.parse_args(["--eval-only", *(options + ours if after else ours + options)])
    assert args.eval_only and args.train_data is None and args.test_data == ["images", "pngs", "json"]
    assert args.opts == ["MODEL.KMAX.TEST.SAVE_PREDICTIONS", "there", "MODEL.DEVICE", "cpu"]


def test_training_program_reports_a_bad_option(train_net):
    with pytest.raises(UserError, match=r"no option SOLVER\.BASELR - did you mean SOLVER\.BASE_LR\?"):
        train_net.main(["--config-file", "coco/r50", "SOLVER.BASELR", "1"])


@pytest.mark.parametrize(
    ("error", "line", "status"),
    [
        ("UserError('no file x')", "error: no file x\n", 1),
        ("KeyboardInterrupt", "\ninterrupted\n", -signal.SIGINT),
        ("OSError(36, 'File name too long', 'x')", "error: File name too long: 'x'\n", 1),
        ("PermissionError(13, 'Permission denied', 'x')", "error: Permission denied: 'x'\n", 1),
        ("BrokenPipeError(32, 'Broken pipe')", "", 1),
        ("MemoryError", "error: not enough memory (MemoryError): use a smaller image, batch, or model\n", 1),
        (
            "RuntimeError('DefaultCPUAllocator: no')",
            "error: not enough memory (DefaultCPUAllocator: no): ",
            1,
        ),
        # As they arrive from another process.
        (
            "RuntimeError('Traceback (most recent call last):\\n  x\\nkmax_d2.errors.UserError: no: x')",
            "error: no: x\n",
            1,
        ),
        ("RuntimeError('Traceback (most recent call last):\\n  x\\nOSError: [Errno 5] I/O')", "error: I/O\n", 1),
        ("ValueError('of a programmer')", "Traceback (most recent call last)", 1),
    ],
)
def test_what_the_user_sees_of_an_error(error, line, status):
    code = f"PARSES_FIRST = True\nfrom kmax_d2.errors import UserError, report_errors\nreport_errors()\nraise {error}"
    done = run("-c", code)
    assert done.returncode == status
    assert done.stderr.startswith(line) if line else not done.stderr
