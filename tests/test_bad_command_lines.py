"""Command lines that cannot work end with one line, in every program."""

import importlib
import os

import programs
import pytest
from PIL import Image

USERS = ("image.png", "images/a.jpg", "empty.yaml", "model.pth")
QUICK = ["--config-file", "shapes/quickstart"]
LONG = "x" * 300
# Options that are wrong in every program that takes them, and the line's beginning.
OPTIONS = [
    (["SOLVER.BASELR", "1"], "no option SOLVER.BASELR - did you mean SOLVER.BASE_LR?"),
    (["SEED"], "options must be NAME VALUE pairs; SEED has no value"),
    (["MODEL.KMAX.NUM_CLASSES", "5"], "MODEL.KMAX.NUM_CLASSES is 5, but "),
    (["DATASETS.TEST", "('shapes_vla',)"], "no dataset shapes_vla is registered - did you mean shapes_val?"),
]
CONFIGS = [
    ("coco/r5", "no config file coco/r5 - did you mean coco/r50?"),
    ("{}/image.png", "{}/image.png is not valid YAML: "),
    ("{}/empty.yaml", "the config {}/empty.yaml must contain options"),
    (LONG, "File name too long"),
]
# Program, its command line without a config and options; {} is a folder with images and other files.
PROGRAMS = {
    "analyze": "--size 65 65",
    "benchmark": "inference --size 65 65 --no-memory",
    "convert": "{}/model.pth {}/new.pth",
    "pseudo_label": "--input {}/images --output {}/new",
    "train_net": "--eval-only",
    "demo": "--input {}/image.png --output {}/new",
    "check_dataset": "--output {}/new",
}
CASES = [
    ("analyze", "--config-file coco/r50 MODEL.BACKBONE.NAME ResNet", "MODEL.BACKBONE.NAME is ResNet, but there are "),
    ("demo", "--config-file coco/r50 --input {}/image.png --opts MODEL.DEVICE cuda:99", "MODEL.DEVICE is cuda:99, but"),
    ("train_net", "--config-file coco/r50 MODEL.DEVICE cuda:99", "MODEL.DEVICE is cuda:99, but must be a device"),
    ("analyze", "--config-file coco/r50 --size 0 65", "--size is 0, but must be"),
    ("analyze", "--config-file coco/r50 --size 65", "status 2"),
    ("analyze", "", "status 2"),
    (
        "benchmark",
        "inference --config-file coco/r50 --repeats 0",
        "--repeats is 0, but must be",
    ),
    ("benchmark", "inference --config-file coco/r50 --batch-size -1", "--batch-size is -1, but must be"),
    ("benchmark", "inference --config-file coco/r50 --precision fp8", "MODEL.KMAX.TEST.PRECISION is fp8, but must be"),
    ("benchmark", "inference --config-file coco/r50 --device gpu", "MODEL.DEVICE is gpu, but must be a device"),
    ("benchmark", "guessing --config-file coco/r50", "status 2"),
    ("check_dataset", "", "give either the names of datasets, or --config-file, or all of"),
    ("check_dataset", "--images {}/images", "give either the names of datasets, or --config-file, or all of"),
    ("check_dataset", "shapes_val --images {}/images --panoptic {} --json {}", "give either the names of datasets"),
    ("check_dataset", "shapes_vla", "no dataset shapes_vla is registered - did you mean shapes_val?"),
    (
        "check_dataset",
        "--images {}/images --panoptic {}/images --json {}/none.json",
        "cannot read the panoptic annotations",
    ),
    ("check_dataset", "--images {}/images --panoptic {}/images --json {}/empty.yaml", "empty.yaml is not valid JSON"),
    ("compare_attention", "--seeds 0", "--seeds is 0, but must be"),
    ("compare_attention", "--output {}/new SOLVER.BASELR 1", "no option SOLVER.BASELR"),
    ("compare_attention", "--output {}/image.png", "image.png"),
    (
        "convert",
        "{}/none.pth {}/new.npz --config-file shapes/quickstart",
        "the name of the output must end in .pth or .pkl",
    ),
    ("convert", "{}/none.pth {}/new.pth --config-file shapes/quickstart", "no checkpoint {}/none.pth"),
    ("convert", "{}/image.png {}/new.pth --config-file shapes/quickstart", "{}/image.png is not a readable checkpoint"),
    ("convert", "{}/images {}/new.pth --config-file shapes/quickstart", "{}/images"),
    ("convert", "{}/model.pth {}/model.pth --config-file shapes/quickstart", "{}/model.pth is the input"),
    ("convert", "{}/none.pth {}/model.pth --config-file shapes/quickstart", "{}/model.pth exists and was not made by"),
    ("convert", "{}/none.pth {}/" + LONG + ".pth --config-file shapes/quickstart", "File name too long"),
    ("pseudo_label", "--config-file shapes/quickstart --input {}/none --output {}/new", "no folder {}/none"),
    ("pseudo_label", "--config-file shapes/quickstart --input {}/no-images --output {}/new", "no images in the folder"),
    ("pseudo_label", "--config-file shapes/quickstart --input {}/images --output {}/image.png", "image.png"),
    (
        "pseudo_label",
        "--config-file shapes/quickstart --input {}/images --output {}/new --weights {}/none",
        "no checkpoint",
    ),
    ("pseudo_label", "--config-file shapes/quickstart --input {}/images --output {}/new --num-gpus 0", "--num-gpus"),
    ("pseudo_label", "--config-file shapes/quickstart --input {}/images --output {}/new --num-gpus -1", "--num-gpus"),
    ("pseudo_label", "--config-file shapes/quickstart --input " + LONG + " --output {}/new", "File name too long"),
    ("quickstart", "--output {}/new SOLVER.MAXITER 3", "no option SOLVER.MAXITER - did you mean SOLVER.MAX_ITER?"),
    ("quickstart", "--output {}/image.png", "image.png"),
    ("demo", "--input {}/none.png --output {}/new", "status 1"),
    ("demo", "--input {}/no-images --output {}/new", "status 1"),
    ("demo", "--config-file shapes/quickstart --input {}/image.png --output {}/image.png", "image.png"),
    ("demo", "--config-file shapes/quickstart --input {}/empty.yaml --output {}/new", "status 1"),
    ("demo", "--config-file shapes/quickstart --input {}/fifo --output {}/new", "status 1"),
    (
        "demo",
        "--config-file shapes/quickstart --weights {}/image.png --input {}/image.png",
        "is not a readable checkpoint",
    ),
    ("demo", "--input " + LONG, "status 1"),
    ("train_net", "", "DATASETS.TRAIN"),
    ("train_net", "--num-gpus 0", "--num-gpus"),
    ("train_net", "--num-gpus -1", "--num-gpus"),
    ("train_net", "--num-machines 2", "--num-machines needs --dist-url"),
    ("train_net", "--config-file shapes/quickstart --eval-only", "--eval-only needs MODEL.WEIGHTS"),
    (
        "train_net",
        "--config-file shapes/quickstart --eval-only --resume",
        "evaluates the last checkpoint, but {}/out has none",
    ),
    ("train_net", "--train-data {}/images {}/images", "options must be NAME VALUE pairs; {}/out has no value"),
    ("train_net", "--train-data {}/images {}/none {}/none.json", "no folder {}/none"),
    ("train_net", "--train-data {}/images {}/images {}/none.json", "cannot read the panoptic annotations {}/none.json"),
    ("train_net", "--train-data {}/images {}/images {}/image.png", "{}/image.png is not valid JSON"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    for name in ("images", "no-images"):
        (folder / name).mkdir()
    Image.new("RGB", (32, 24)).save(folder / "image.png")
    Image.new("RGB", (32, 24)).save(folder / "images" / "a.jpg")
    for name in ("empty.yaml", "model.pth"):
        (folder / name).touch()
    os.mkfifo(folder / "fifo")
    return folder


def run(program, words, folder, monkeypatch):
    """The line with which a program ends, in a folder of its own; what follows {} is in the folder."""
    monkeypatch.chdir(folder)
    files = {"demo": programs.DEMO, "train_net": programs.TRAIN_NET}
    module = programs.load(files[program]) if program in files else importlib.import_module(f"kmax_d2.tools.{program}")
    argv = [word.replace("{}", str(folder)) for word in words]
    return programs.one_line(module.main, argv)


@pytest.mark.parametrize(("program", "command", "line"), CASES)
def test_what_cannot_work(folder, monkeypatch, program, command, line):
    words = command.split()
    if program == "train_net":
        words += ["OUTPUT_DIR", "{}/out"]
    users = {name: (folder / name).read_bytes() for name in USERS}
    found = run(program, words, folder, monkeypatch)
    assert found and line.replace("{}", str(folder)) in found
    assert {name: (folder / name).read_bytes() for name in USERS} == users


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(("options", "line"), OPTIONS, ids=lambda value: value if isinstance(value, str) else value[0])
def test_options(folder, monkeypatch, program, options, line):
    flag = ["--opts"] if program in ("demo", "check_dataset") else []
    words = [*PROGRAMS[program].split(), *QUICK, *flag, *options]
    found = run(program, words, folder, monkeypatch)
    assert found and found.startswith(f"error: {line}")


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(("config", "line"), CONFIGS)
def test_configs(folder, monkeypatch, program, config, line):
    words = [*PROGRAMS[program].split(), "--config-file", config]
    found = run(program, words, folder, monkeypatch)
    assert found and line.replace("{}", str(folder)) in found
