"""Weights in whatever a training program saved them, and files that must not be used: damaged, crafted, not numbers."""

import argparse
import logging
import pickle

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from safetensors.torch import save_file
from small import build

from kmax_d2.checkpoint import KMaXCheckpointer
from kmax_d2.checkpoint.class_rows import take_rows
from kmax_d2.checkpoint.origin import describe_model, merge_checkpoint
from kmax_d2.engine import load_config
from kmax_d2.errors import UserError
from kmax_d2.options import default_config

NAME = "transformer_decoder.centers"


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(1)
    return {name: torch.rand_like(w) if w.is_floating_point() else w for name, w in build().state_dict().items()}


def loaded(content, file):
    """A model with the weights of a file that holds this content."""
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    model = build()
    KMaXCheckpointer(model, complete=True).load(str(file))
    return model.state_dict()


def prefixed(weights, prefix):
    return {prefix + name: weight for name, weight in weights.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: {"state_dict": w, "epoch": 3},
        lambda w: {"model_state_dict": w, "optimizer_state_dict": {"state": {}, "param_groups": []}},
        lambda w: prefixed(w, "module."),
        lambda w: {"model": prefixed(w, "module._orig_mod.")},
        lambda w: {"state_dict": prefixed(w, "model."), "pytorch-lightning_version": "2.4", "hparams": {"lr": 1e-3}},
        lambda w: {"model_ema": {"module": w}},
        lambda w: {"model": w, "args": argparse.Namespace(lr=0.1, name="x"), "best": np.float64(3.5), "n": np.int64(2)},
        lambda w: {"state_dict": prefixed(w, "model.") | {"criterion.weight": torch.ones(3)}},
    ],
)
def test_the_only_set_of_weights_is_found(weights, wrap, tmp_path, caplog):
    found = loaded(wrap(weights), tmp_path / "model.pth")
    assert all(torch.equal(found[name], weight) for name, weight in weights.items() if "batches" not in name)


def test_safetensors_with_metadata(weights, tmp_path):
    contiguous = {name: weight.contiguous() for name, weight in prefixed(weights, "module.").items()}
    save_file(contiguous, tmp_path / "model.safetensors", {"format": "pt"})
    model = build()
    KMaXCheckpointer(model, complete=True).load(str(tmp_path / "model.safetensors"))
    assert torch.equal(model.state_dict()[NAME], weights[NAME])


def test_of_two_sets_one_must_be_chosen(weights, tmp_path):
    for content in ({"model": weights, "model_ema": weights}, prefixed(weights, "model.") | prefixed(weights, "ema.")):
        with pytest.raises(UserError, match=r"holds 2 sets of weights, .*choose one"):
            loaded(content, tmp_path / "model.pth")


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(2, 2, dtype=torch.complex64),
        torch.ones(2, 2).to_sparse(),
        torch.ones(2, 2, device="meta"),
        np.array(["a", "b"]),
        "text",
        3,
        None,
    ],
    ids=str,
)
def test_what_is_no_plain_tensor_of_numbers(weights, value, tmp_path):
    with pytest.raises(UserError) as error:
        loaded({"model": weights | {NAME: value}}, tmp_path / "model.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_whole_numbers_are_not_weights(weights, dtype, tmp_path):
    with pytest.raises(UserError, match=rf"has whole numbers \({dtype}\) as the weights {NAME}"):
        loaded({"model": weights | {NAME: weights[NAME].to(dtype)}}, tmp_path / "model.pth")


@pytest.mark.parametrize(
    "content",
    [
        {"blobs": None},
        {"blobs": [1]},
        {1: np.ones(2, np.float32)},
        {"model": {NAME: np.ones((12, 16), np.longdouble)}},
        {"conv1.weight": np.float32(1).reshape(()), "layer1.0.conv1.weight": np.ones(1, np.float32)},
        {name: np.ones((), np.float32) for name in ("stem.0.weight", "stages.0.blocks.0.conv_dw.weight")},
    ],
)
def test_pickles_of_other_content(content, tmp_path):
    with pytest.raises(UserError) as error:
        loaded(pickle.dumps(content), tmp_path / "model.pkl")
    assert "\n" not in str(error.value)


def test_names_that_are_numbers(weights, tmp_path):
    with pytest.raises(UserError, match="does not hold weights by name"):
        loaded({"model": {1: torch.ones(2), 2: torch.ones(2)}}, tmp_path / "model.pth")


class Call:
    """Pickled as a call of a function with arguments."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


MULTIARRAY = np.core.multiarray if np.__version__ < "2" else np._core.multiarray


@pytest.mark.parametrize(
    "value",
    [
        Call(MULTIARRAY.scalar, np.dtype("O"), b"A" * 8),  # NumPy would follow this pointer
        Call(MULTIARRAY.scalar, np.dtype([("a", "O")]), b"A" * 8),
        np.array([object], dtype=object),
        np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f4")]),
        Call(print, "ran"),
    ],
)
def test_crafted_pickles_are_refused(value, tmp_path, capsys):
    with pytest.raises(UserError, match=r"model\.pkl is not"):
        loaded(pickle.dumps({"model": {NAME: value}}, protocol=2), tmp_path / "model.pkl")
    assert "ran" not in capsys.readouterr().out


def test_damaged_bytes_of_a_tensor(weights, tmp_path):
    file = tmp_path / "model.pth"
    torch.save({"model": weights}, file)
    content, start = bytearray(file.read_bytes()), file.read_bytes().find(weights[NAME].numpy().tobytes())
    content[start + 5] ^= 1
    with pytest.raises(UserError, match=r"is not a readable checkpoint: it is damaged.*CRC"):
        loaded(bytes(content), file)


@pytest.mark.parametrize(
    "entry",
    [
        [],
        None,
        "text",
        {},
        {"options": "MODEL: [", "categories": []},
        {"options": "", "categories": []},
        {"options": "MODEL: text", "categories": []},
        {"options": "MODEL: {KMAX: {NUM_CLASSES: 3, RESNET: 5}}", "categories": []},
        {"options": "MODEL: {KMAX: {NUM_CLASSES: 3}}", "categories": None},
        {"options": "MODEL: {KMAX: {NUM_CLASSES: 3}}", "categories": "text"},
        {"options": "MODEL: {KMAX: {NUM_CLASSES: 3}}", "categories": [{"id": 1, "name": "a", "isthing": "yes"}]},
        {"options": 3, "categories": []},
        {"options": "- a", "categories": []},
        {"options": "SEED: 1", "categories": [{"id": 1}]},
        {"options": "SEED: 1", "categories": [{"id": 1, "name": "a", "isthing": 1}] * 2},
        {"options": "SEED: 1", "categories": 7},
        {"options": "SEED: 1"},
    ],
)
def test_a_broken_description_of_the_model_is_one_line(weights, entry, tmp_path):
    torch.save({"model": weights, "kmax_d2": entry}, tmp_path / "model.pth")
    with pytest.raises(UserError) as error:
        merge_checkpoint(default_config(), str(tmp_path / "model.pth"))
    assert "model.pth as its weights" in str(error.value)
    assert "\n" not in str(error.value)


NAMED = [{"id": number, "name": f"class {number}", "isthing": 1} for number in range(200)]


@pytest.mark.parametrize(
    "entry",
    [[], None, "text", {"categories": None}, {"categories": [1]}, {"categories": [{"name": 3}]}, {"categories": NAMED}],
)
def test_weights_beside_a_broken_description_are_taken(weights, entry, tmp_path):
    torch.save({"model": weights, "kmax_d2": entry}, tmp_path / "model.pth")
    model = build()
    KMaXCheckpointer(model, origin={"kmax_d2": {"categories": NAMED[100:233]}}).load(str(tmp_path / "model.pth"))
    assert torch.equal(model.state_dict()[NAME], weights[NAME])


def test_options_of_a_newer_version_are_named(weights, tmp_path, caplog):
    origin = describe_model(load_config("coco/base"))
    origin["kmax_d2"]["options"] += "  KMAX_NEWER: 1\n"
    text = origin["kmax_d2"]["options"].replace("  KMAX:\n", "  KMAX:\n    NEWER: 1\n")
    torch.save({"model": weights, "kmax_d2": origin["kmax_d2"] | {"options": text}}, tmp_path / "model.pth")
    with caplog.at_level(logging.WARNING):
        merge_checkpoint(default_config(), str(tmp_path / "model.pth"))
    assert "unknown here: MODEL.KMAX.NEWER" in caplog.text


def test_rows_go_by_name_to_as_many_other_classes():
    coco = MetadataCatalog.get("coco_2017_val_panoptic").stuff_classes
    head = "transformer_decoder.predictor.class_head.bias"
    weights, own = {head: torch.arange(134.0)}, {head: torch.zeros(134)}
    take_rows(weights, coco, own, list(reversed(coco)))
    assert weights[head].tolist() == [*range(132, -1, -1), 133]


def test_equal_names_come_before_similar_ones():
    head = "transformer_decoder.predictor.class_head.bias"
    for names in (["sky", "sky-other-merged"], ["sky-other-merged", "sky"]):
        weights = {head: torch.arange(3.0)}
        take_rows(weights, names, {head: torch.zeros(3)}, ["sky", "sky-other-merged"])
        assert weights[head].tolist() == [names.index("sky"), names.index("sky-other-merged"), 2]


def test_a_folder_names_the_weights_in_it(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"it is a folder - did you mean .*model\.safetensors"):
        KMaXCheckpointer(build()).load(str(tmp_path))


def test_catalogs_of_detectron2_that_cannot_be_reached_are_one_line():
    for address in ("catalog://ImageNetPretrained/None", "detectron2://None/R-50.pkl"):
        with pytest.raises(UserError, match=address.partition(":")[0]):
            KMaXCheckpointer(build()).load(address)
