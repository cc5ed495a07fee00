"""What the web page shows and says; tests/web has the page itself in a browser."""

import json
import sys

import numpy as np
import programs
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from kmax_d2.data.datasets import shapes
from kmax_d2.errors import UserError
from kmax_d2.inference import Segment, load


@pytest.fixture(scope="module")
def web():
    return programs.load(programs.WEB)


@pytest.fixture(scope="module")
def models(web):
    return web.Models(load("shapes/quickstart", device="cpu"))


def test_an_upload_becomes_pictures_and_json(web, models, tmp_path):
    image = shapes.draw(1, 0)[0]
    Image.fromarray(image).save(tmp_path / "image.png")
    view, pictures, text = web.segment(models("shapes/quickstart"), str(tmp_path / "image.png"))
    result = models("shapes/quickstart")(image)
    assert np.array_equal(view.ids, result.panoptic.ids) and view.segments == result.panoptic.segments
    assert all(np.array_equal(p, result.draw(k)) for p, k in zip(pictures, web.KINDS, strict=True))
    assert [title for title, _ in view.clusters] == [
        "decoder 1 (stride 32)",
        "decoder 2 (stride 16)",
        "decoder 3 (stride 8)",
        "final clusters (stride 4)",
    ]
    content = json.loads(text)
    ids = np.zeros_like(view.ids)
    for info in content["segments_info"]:
        ids += info["id"] * coco_mask.decode(info["segmentation"])
    assert np.array_equal(ids, result.panoptic.ids)
    assert [info["category"] for info in content["segments_info"]] == [s.class_name for s in view.segments]
    # Every corner of the enlarged picture is some point of the id map.
    height, width = pictures[0].shape[:2]
    assert all(web.describe(view, x, y) for x in (0, width) for y in (0, height))


def test_a_click(web):
    ids = np.array([[0, 7], [7, 7]], dtype=np.int32)
    view = web.View(ids, [Segment(7, 2, "car", True, 0.914, 3, (0, 0, 2, 2))], 10.0, [])
    assert web.describe(view, 10, 9) == "car (thing, segment 1): score 0.91, 3 pixels (75.0%)"
    assert web.describe(view, 9, 9) == "no segment here: the model is not sure"


def test_large_uploads_are_reduced(web, tmp_path):
    Image.new("RGB", (4000, 3), "red").save(tmp_path / "wide.png")
    image = web.read_upload(str(tmp_path / "wide.png"))
    assert image.shape == (1, 1280, 3) and (image == (255, 0, 0)).all()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.png", b"no image", r"cannot read the image that you sent: it is not an image"),
        ("cut.png", None, r"cannot read the image that you sent: "),
        ("huge.png", (8000, 8000), r"the image has 8000 by 8000 pixels; at most 50,000,000 in all are allowed"),
    ],
)
def test_bad_uploads(web, tmp_path, name, content, message):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        Image.new("1", content or (300, 300)).save(tmp_path / name)
        if content is None:
            (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:60])
    with pytest.raises(UserError, match=message) as error:
        web.read_upload(str(tmp_path / name))
    assert str(tmp_path) not in str(error.value)


def test_models(web, models, tmp_path, monkeypatch, capsys):
    assert models.default == "shapes/quickstart" and {"camvid/street", "coco/r50"} < set(models.names)
    assert models("shapes/quickstart") is models.first
    assert "road" in models("camvid/street").class_names
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    monkeypatch.setitem(web.model_zoo.WEIGHTS, "coco/r50", "http://127.0.0.1:9/r50.tar.gz")
    with pytest.raises(UserError, match=r"^the weights of coco/r50 cannot be downloaded now: choose another model$"):
        models("coco/r50")
    assert str(tmp_path) in capsys.readouterr().err  # the whole reason is for whoever runs the server


def test_without_gradio_it_is_one_line(web, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert programs.one_line(web.main, ["--port", "0"]) == "error: gradio is not installed: pip install 'kmax_d2[web]'"
