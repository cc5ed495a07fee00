"""Published weights by name: their addresses, their download, and every way in which it can fail."""

import tarfile
from pathlib import Path

import published
import pytest
import reference
import torch

from kmax_d2 import model_zoo
from kmax_d2.checkpoint.download import download
from kmax_d2.engine import load_config
from kmax_d2.errors import UserError

ROOT = Path(__file__).parents[1]
NAME = "coco/r50_tiny"


@pytest.mark.parametrize(
    ("name", "archive"),
    [
        ("coco/r50", "kmax_resnet50_coco_train"),
        ("configs/cityscapes/maxs.yaml", "kmax_maxs_gelu_cityscapes_train"),
        ("coco/convnext_l_unlabeled", "kmax_convnext_large_coco_train_unlabeled"),
        ("ade20k/convnext_l_641", "kmax_convnext_large_res641_ade20k_train"),
        ("ade20k/r50_1281", "kmax_resnet50_res1281_ade20k_train"),
    ],
)
def test_addresses(name, archive):
    address = f"https://storage.googleapis.com/gresearch/tf-deeplab/checkpoint/{archive}.tar.gz"
    assert model_zoo.get_checkpoint_url(name) == address
    weights = model_zoo.get_config(name, trained=True).MODEL.WEIGHTS
    assert weights == address
    assert model_zoo.get_config(name).dump() == load_config(name).dump()


def test_every_config_of_the_paper_has_weights_but_for_its_256_queries():
    configs = {
        str(file.relative_to(ROOT / "configs").with_suffix(""))
        for dataset in ("coco", "cityscapes", "ade20k")
        for file in (ROOT / "configs" / dataset).glob("*.yaml")
        if "base" not in file.stem
    }
    without = {"coco/r50_standard", "coco/r50_tiny", "coco/convnext_l_256q", "cityscapes/r50_standard"}
    without |= {"coco/vit_b_dinov3", "coco/convnext_t_dinov3"}  # not of the paper
    assert {name for name in configs if not model_zoo.has_weights(name)} == without
    addresses = [model_zoo.get_checkpoint_url(name) for name in configs - without]
    assert len(set(addresses)) == len(addresses) == 17


def test_names_without_weights():
    with pytest.raises(UserError, match=r"no weights of coco/r50_tiny are published - did you mean coco/r50\?"):
        model_zoo.get_checkpoint_url(NAME)
    with pytest.raises(UserError, match=r"no config file coco/r5 - did you mean coco/r50\?"):
        model_zoo.get_checkpoint_url("coco/r5")
    with pytest.raises(UserError, match=r"no config file zzzz\. The project has "):
        model_zoo.get_checkpoint_url("zzzz")


@pytest.fixture(scope="module")
def source():
    torch.manual_seed(3)
    return published.randomize(reference.build(NAME))


@pytest.fixture(scope="module")
def archive(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    published.write_checkpoint(folder / "ckpt-150000", published.official_variables(source))
    with tarfile.open(folder / "tiny.tar.gz", "w:gz", compresslevel=1) as tar:
        for file in folder.glob("ckpt*"):
            tar.add(file, f"tiny/{file.name}")
    return folder / "tiny.tar.gz"


@pytest.fixture
def web(archive, monkeypatch, tmp_path):
    """A server that publishes a small model, an empty cache, and a zoo that knows of it."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    with published.server(archive.parent) as web:
        monkeypatch.setitem(model_zoo.WEIGHTS, NAME, f"{web.address}/tiny.tar.gz")
        yield web


def cached(tmp_path):
    return [file.name for file in (tmp_path / "cache").rglob("*") if file.is_file() and file.suffix != ".lock"]


def assert_is(model, source):
    actual, expected = published.weights(model), published.weights(source)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_one_line_gives_a_trained_model_and_needs_the_network_once(web, source, tmp_path):
    assert_is(model_zoo.get(NAME, trained=True, device="cpu"), source)
    assert cached(tmp_path) == ["tiny.tar.gz"]
    web.stop()
    assert_is(model_zoo.get(NAME, trained=True, device="cpu"), source)


def test_without_a_network(web, tmp_path):
    web.stop()
    place = tmp_path / "cache" / "tiny.tar.gz"
    with pytest.raises(UserError, match=rf"cannot download {web.address}/tiny\.tar\.gz \(.*refused.*{place}") as error:
        model_zoo.get(NAME, trained=True, device="cpu")
    assert "\n" not in str(error.value)


def test_an_address_that_has_nothing(web, archive, source, tmp_path):
    with pytest.raises(UserError, match=r"/none\.tar\.gz \(HTTP Error 404"):
        download(f"{web.address}/none.tar.gz")
    place = tmp_path / "cache" / "tiny.tar.gz"
    place.write_bytes(archive.read_bytes())  # by hand, as the message says
    assert_is(model_zoo.get(NAME, trained=True, device="cpu"), source)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("interrupted", r"cannot download .*got only \d+ out of \d+ bytes"),
        ("no length", r"tiny\.tar\.gz gave no checkpoint: .*cache/tiny\.tar\.gz .*cut short.* was removed; run again"),
        ("page", r"tiny\.tar\.gz gave no checkpoint: .*cache/tiny\.tar\.gz .*a web page.* was removed; run again"),
    ],
)
def test_a_faulty_download_leaves_nothing_behind(web, source, tmp_path, fault, message):
    web.fault = fault
    with pytest.raises(UserError, match=message):
        model_zoo.get(NAME, trained=True, device="cpu")
    assert cached(tmp_path) == []
    web.fault = None
    assert_is(model_zoo.get(NAME, trained=True, device="cpu"), source)


def test_weights_that_do_not_fit_stay_in_the_cache(web, tmp_path, monkeypatch):
    monkeypatch.setitem(model_zoo.WEIGHTS, "shapes/quickstart", f"{web.address}/tiny.tar.gz")
    with pytest.raises(UserError, match="weights do not fit"):
        model_zoo.get("shapes/quickstart", trained=True, device="cpu")
    assert cached(tmp_path) == ["tiny.tar.gz"]
