"""Damaged files give a result or one line: never a traceback, never a hang."""

import json
import random
import shutil
import signal

import published
import pytest
import torch
import yaml
from programs import one_line
from safetensors.torch import save_file
from small import SMALL_MODEL, build, options

from kmax_d2.checkpoint import load_weights
from kmax_d2.data import PanopticTrainMapper
from kmax_d2.data.datasets import coco_panoptic, shapes
from kmax_d2.engine import load_config
from kmax_d2.tools.convert import write_checkpoint

ODD = [None, True, -1, 0, 2**70, 1.5, float("nan"), "", "x", "\x00", "../..", "é" * 300, [], {}, [[]], {"a": 1}]
SECONDS = 30  # in which a damaged file must be done with


def damaged(content, rng):
    """Bytes with some of them changed, left out, doubled, or cut off."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 3, 20])):
        place = rng.randrange(1 + min(len(content), 400 if rng.random() < 0.5 else len(content)))  # headers matter more
        length = rng.choice([1, 4, 50])
        piece = content[place : place + length]
        content[place : place + length] = rng.choice([rng.randbytes(len(piece)), b"", 2 * piece, bytes(len(piece))])
    return bytes(content[: rng.randrange(1 + len(content))] if rng.random() < 0.2 else content)


def odd(value, rng):
    """Nested lists and dicts with one value, at random, replaced by an odd one or left out."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.9:
        copy = value.copy()
        key = rng.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
        if rng.random() < 0.1:
            del copy[key]
        else:
            copy[key] = odd(copy[key], rng)
        return copy
    return rng.choice(ODD)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    shapes.write_split(folder, "val", 1, 5)
    return folder


@pytest.fixture(scope="module")
def model():
    return build(MODEL__KMAX__NUM_CLASSES=3)


@pytest.fixture(scope="module")
def checkpoints(model, tmp_path_factory):
    """The model's weights in every format of a single file, and a TensorFlow checkpoint's index."""
    folder, weights = tmp_path_factory.mktemp("checkpoints"), model.state_dict()
    for name in ("model.pth", "model.pkl"):
        write_checkpoint(weights, folder / name, {})
    torch.save({"model": weights}, folder / "old.pth", _use_new_zipfile_serialization=False)
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    published.write_checkpoint(folder / "ckpt-1", published.official_variables(published.build()))
    return folder


def train_sample(data):
    """The first training sample of a dataset folder."""
    record = coco_panoptic.load(str(data / "panoptic_val.json"), str(data / "val"), str(data / "panoptic_val"))[0]
    return PanopticTrainMapper(load_config("", options()))(record)


def damage_json(folder, data, rng, request):
    shutil.copytree(data, folder, dirs_exist_ok=True)
    file = folder / "panoptic_val.json"
    content = file.read_bytes()
    file.write_bytes(
        damaged(content, rng) if rng.random() < 0.4 else json.dumps(odd(json.loads(content), rng)).encode()
    )
    train_sample(folder)


def damage_image(folder, data, rng, request):
    shutil.copytree(data, folder, dirs_exist_ok=True)
    file = folder / rng.choice(["val/0000.jpg", "panoptic_val/0000.png"])
    file.write_bytes(damaged(file.read_bytes(), rng))
    train_sample(folder)


def damage_config(folder, data, rng, request):
    content = load_config("", options())
    content = yaml.safe_load(content.dump()) if rng.random() < 0.5 else {}
    for name, value in SMALL_MODEL.items():
        node = content
        *sections, last = name.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    text = yaml.safe_dump(odd(content, rng)) if rng.random() < 0.6 else yaml.safe_dump(content)
    (folder / "config.yaml").write_bytes(damaged(text.encode(), rng) if rng.random() < 0.6 else text.encode())
    load_config(str(folder / "config.yaml"))


def damage_checkpoint(folder, data, rng, request):
    source = request.getfixturevalue("checkpoints")
    name = rng.choice(["model.pth", "model.pkl", "old.pth", "model.safetensors", "ckpt-1.index"])
    if name.startswith("ckpt"):
        shutil.copytree(source, folder, dirs_exist_ok=True)
    (folder / name).write_bytes(damaged((source / name).read_bytes(), rng))
    load_weights(request.getfixturevalue("model"), str(folder / name.removesuffix(".index")))


def hangs(number, frame):
    raise AssertionError(f"not done after {SECONDS} seconds")


@pytest.mark.parametrize("damage", [damage_json, damage_image, damage_config, damage_checkpoint])
@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 20))])
def test_damaged_files_are_a_result_or_one_line(tmp_path, data, damage, part, request):
    rng = random.Random(f"{damage.__name__} {part}")
    handler = signal.signal(signal.SIGALRM, hangs)
    refused = 0
    try:
        for number in range(25):
            (tmp_path / str(number)).mkdir()
            signal.alarm(SECONDS)
            refused += one_line(damage, tmp_path / str(number), data, rng, request) is not None
            shutil.rmtree(tmp_path / str(number))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    assert refused
