"""MODEL.WEIGHTS takes every published format, by content, and says what is wrong with what is none."""

import collections
import gzip
import io
import logging
import pickle
import resource
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import published
import pytest
import torch
from published import PORT_OPTIONS, assert_loaded
from safetensors.torch import save, save_file
from torch import nn

from kmax_d2.checkpoint import KMaXCheckpointer, load_weights
from kmax_d2.checkpoint.formats import read_checkpoint
from kmax_d2.errors import UserError


@pytest.fixture(scope="module")
def source():
    torch.manual_seed(3)
    return published.build()


@pytest.fixture(scope="module")
def checkpoint(source, tmp_path_factory):
    """The prefix of a TensorFlow checkpoint."""
    prefix = tmp_path_factory.mktemp("tf") / "ckpt-150000"
    published.write_checkpoint(prefix, published.official_variables(source))
    return prefix


@pytest.fixture
def log(caplog, monkeypatch):
    """What the checkpointer says; a command that ran before may have taken its logger to itself."""
    monkeypatch.setattr(logging.getLogger("fvcore"), "propagate", True)
    with caplog.at_level(logging.INFO):
        yield caplog


@pytest.fixture
def archive(checkpoint, tmp_path):
    with tarfile.open(tmp_path / "kmax.tar.gz", "w:gz", compresslevel=1) as tar:
        for file in sorted(checkpoint.parent.iterdir()):
            tar.add(file, f"./kmax/{file.name}")
        tar.addfile(tarfile.TarInfo("kmax/ckpt-9.index"))  # an older one
    return tmp_path / "kmax.tar.gz"


@pytest.mark.parametrize("ending", ["", ".index", ".data-00001-of-00002"])
def test_tensorflow_checkpoint(source, checkpoint, ending):
    model = published.build()
    load_weights(model, f"{checkpoint}{ending}")
    assert_loaded(model, published.weights(source))


@pytest.mark.parametrize("name", ["kmax.tar.gz", "a file.pth"])
def test_archive_by_any_name(source, archive, tmp_path, monkeypatch, name):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    model = published.build()
    load_weights(model, str(archive.rename(tmp_path / name)))
    assert_loaded(model, published.weights(source))
    assert not list(temporary.iterdir())


def test_a_checkpoint_of_many_tensors_needs_few_open_files(source, checkpoint):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        assert len(read_checkpoint(str(checkpoint), source)["model"]) > 400
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_archive_writes_nowhere_else(tmp_path, source):
    with tarfile.open(tmp_path / "evil.tar.gz", "w:gz") as tar:
        outside = tarfile.TarInfo(f"../../..{tmp_path}/ckpt-1.index")
        outside.size = 3
        tar.addfile(outside, io.BytesIO(b"abc"))
        link = tarfile.TarInfo("ckpt-2.index")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "evil.tar.gz")
        tar.addfile(link)
    # Of the two only the first is a file; it is read as what it is.
    with pytest.raises(UserError, match=r"evil\.tar\.gz: ckpt-1\.index is damaged"):
        read_checkpoint(str(tmp_path / "evil.tar.gz"), source)
    assert [file.name for file in tmp_path.iterdir()] == ["evil.tar.gz"]


def test_port(tmp_path):
    source = published.build(**PORT_OPTIONS)
    torch.save({"model": published.port_state_dict(source), "iteration": 7}, tmp_path / "port.pth")
    model = published.build(**PORT_OPTIONS)
    load_weights(model, str(tmp_path / "port.pth"))
    assert_loaded(model, published.weights(source))
    with pytest.raises(UserError, match=r"PIXEL_DECODER\.DILATION 1, MODEL\.KMAX\.RESNET\.STANDARD True"):
        load_weights(published.build(), str(tmp_path / "port.pth"))


def test_an_archive_that_unpacks_to_far_more_than_its_size_is_not_read(tmp_path, source):
    with tarfile.open(tmp_path / "bomb.tar.gz", "w:gz") as tar:
        member = tarfile.TarInfo("ckpt-1.data-00000-of-00001")
        member.size = 10**7
        tar.addfile(member, io.BytesIO(bytes(member.size)))
    with pytest.raises(UserError, match="it unpacks to over 50 times its size"):
        read_checkpoint(str(tmp_path / "bomb.tar.gz"), source)


@pytest.mark.parametrize("name", ["evil.pkl", "evil.pth", "evil.safetensors"])
def test_no_file_runs_code(tmp_path, source, name):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    (tmp_path / name).write_bytes(pickle.dumps({"model": {"a": Evil()}}))
    with pytest.raises(UserError, match=name):
        read_checkpoint(str(tmp_path / name), source)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["zip.pth", "zip.pkl", "legacy.pth", "arrays.pkl", "arrays.pth", "flat.safetensors"])
def test_our_own_files_by_content(source, tmp_path, name):
    state_dict = published.weights(source)
    file = tmp_path / name
    if name.startswith("arrays"):
        arrays = {name: value.numpy() for name, value in state_dict.items()}
        file.write_bytes(pickle.dumps({"model": arrays, "__author__": "someone"}))
    elif name.startswith("flat"):
        save_file({key: value.contiguous() for key, value in state_dict.items()}, file)
    else:
        torch.save({"model": state_dict}, file, _use_new_zipfile_serialization=name.startswith("zip"))
    model = published.build()
    load_weights(model, str(file))
    assert_loaded(model, state_dict)


def test_a_training_state_outlives_its_file(tmp_path):
    def optimizer(model):
        return torch.optim.AdamW(model.parameters(), lr=1e-3)

    source = published.build()
    trained = optimizer(source)
    sum(parameter.sum() for parameter in source.parameters()).backward()
    trained.step()
    KMaXCheckpointer(source, str(tmp_path), optimizer=trained).save("model", iteration=5)
    model = published.build()
    resumed = optimizer(model)
    rest = KMaXCheckpointer(nn.parallel.DataParallel(model), optimizer=resumed).load(str(tmp_path / "model.pth"))
    (tmp_path / "model.pth").write_bytes(b"")
    assert rest["iteration"] == 5
    expected, actual = (state.state_dict()["state"] for state in (trained, resumed))
    assert expected.keys() == actual.keys() and all(
        torch.equal(expected[key]["exp_avg"], actual[key]["exp_avg"]) for key in expected
    )
    assert_loaded(model, published.weights(source))


def test_distributed_model(source, checkpoint, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(published.build())
        KMaXCheckpointer(model, complete=True).load(str(checkpoint))
        assert_loaded(model.module, published.weights(source))
    finally:
        torch.distributed.destroy_process_group()


def write_zip(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("notes.txt", "weights are elsewhere")


def write_cut(file):
    torch.save({"model": {"a": torch.zeros(9999)}}, file)
    file.write_bytes(file.read_bytes()[:9999])


def write_other_archive(file):
    with tarfile.open(file, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("model/saved_model.pb"))


def write_cut_archive(file):
    with tarfile.open(file, "w:gz") as archive:
        member = tarfile.TarInfo("ckpt-1.index")
        member.size = 10**5
        archive.addfile(member, io.BytesIO(np.random.default_rng(0).bytes(10**5)))
    file.write_bytes(file.read_bytes()[: 5 * 10**4])


BAD_FILES = {
    "it is empty": lambda file: file.write_bytes(b""),
    "it is a web page": lambda file: file.write_text("\n<!DOCTYPE html>\n<html></html>"),
    "it is a text file": lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\n"),
    "it is a file of unknown format": lambda file: file.write_bytes(bytes(range(256))),
    r"it is damaged, cut short, or of another kind \(.*not in a subdirectory: notes\.txt": write_zip,
    r"it is damaged, cut short, or of another kind \(a zip archive without its end": write_cut,
    r"it is damaged, cut short, or of another kind \(unexpected end of data\)": write_cut_archive,
    r"it is damaged, cut short, or of another kind \(pickle data was truncated": lambda file: file.write_bytes(
        pickle.dumps("a" * 99)[:50]
    ),
    "it is an archive without ckpt*.index in it".replace("*", r"\*"): write_other_archive,
    "it is a gzip file without an archive": lambda file: file.write_bytes(gzip.compress(b"<html></html>" * 99)),
    "it does not hold weights by name": lambda file: torch.save([torch.zeros(1)], file),
    r"besides tensors it holds (builtins\.)?print, which could": lambda file: torch.save({"model": print}, file),
    r"besides tensors it holds builtins\.print, which could run": lambda file: file.write_bytes(
        pickle.dumps({"model": {"a": print}})
    ),
    r"it is damaged, cut short, or of another kind \(Error while deserializing": lambda file: file.write_bytes(
        save({"a": torch.zeros(99)})[:-1]
    ),
    r"it is a folder - did you mean .*/model\.pth/ckpt-100\?": lambda file: (
        file.mkdir(),
        [(file / f"ckpt-{number}.index").touch() for number in (9, 100)],
    ),
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_other_things_than_checkpoints(source, tmp_path, message):
    file = tmp_path / "model.pth"
    BAD_FILES[message](file)
    with pytest.raises(UserError, match=rf"model\.pth .*{message}") as error:
        load_weights(source, str(file))
    assert "\n" not in str(error.value)


def test_backbone_alone(source, checkpoint, tmp_path, log):
    encoder = {name: array for name, array in published.official_variables(source).items() if name.startswith("enc")}
    published.write_checkpoint(tmp_path / "ckpt-1", encoder)
    model = published.build()
    initial = published.weights(model)
    KMaXCheckpointer(model).load(str(tmp_path / "ckpt-1"))
    expected = {
        name: value if name.startswith("backbone.") else initial[name]
        for name, value in published.weights(source).items()
    }
    assert_loaded(model, expected)
    count = len(encoder)
    assert f"loaded {count} of {count} weights of the backbone; the rest starts from scratch" in log.text
    assert "WARNING" not in log.text
    with pytest.raises(UserError, match=r"holds only a backbone: set MODEL\.WEIGHTS to weights of the whole model"):
        load_weights(model, str(tmp_path / "ckpt-1"))


def test_fine_tuning_keeps_its_own_class_heads(source, checkpoint, log):
    model = published.build(MODEL__KMAX__NUM_CLASSES=9, DATASETS__TEST=("shapes_val",))
    initial, given = published.weights(model), published.weights(source)
    KMaXCheckpointer(model).load(str(checkpoint))
    of_classes = {name for name in given if given[name].shape != initial[name].shape}
    assert len(of_classes) == 7 * 2 + 2
    assert_loaded(model, {name: initial[name] if name in of_classes else given[name] for name in given})
    warnings = [record.getMessage() for record in log.records if record.levelno >= logging.WARNING]
    assert warnings == ["16 weights start from scratch: their class heads have another number of classes"]
    with pytest.raises(UserError, match=r"14 of \d+ weights do not fit"):
        load_weights(model, str(checkpoint))


def test_a_wrong_shape_is_an_error_in_training_too(checkpoint):
    model = published.build(MODEL__KMAX__TRANSFORMER_DECODER__NUM_QUERIES=20)
    message = r"1 of \d+ weights do not fit, e\.g\. transformer_decoder\.centers has shape \(12, 16\), not \(20, 16\)"
    with pytest.raises(UserError, match=message):
        KMaXCheckpointer(model).load(str(checkpoint))


def test_another_models_tensors(source, tmp_path):
    torch.save(collections.OrderedDict(a=torch.zeros(2)), tmp_path / "other.pth")
    with pytest.raises(UserError, match="none of its weights fit"):
        load_weights(source, str(tmp_path / "other.pth"))
