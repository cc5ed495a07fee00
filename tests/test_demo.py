"""The demo as a user runs it: images in, overlays out, every fault named."""

import json
import time
from pathlib import Path

import numpy as np
import programs
import published
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image
from small import options

from kmax_d2 import model_zoo
from kmax_d2.data.datasets import shapes
from kmax_d2.engine import ready_config
from kmax_d2.errors import UserError
from kmax_d2.images import find_images

# A random model's classes are not confident; of two masks one is always above the pixel threshold.
SURE = options(
    MODEL__KMAX__TRANSFORMER_DECODER__NUM_QUERIES=2,
    MODEL__KMAX__TEST__THING_THRESHOLD=0.0,
    MODEL__KMAX__TEST__STUFF_THRESHOLD=0.0,
    MODEL__KMAX__TEST__OVERLAP_THRESHOLD=0.0,
    MODEL__KMAX__TEST__THING_AREA_LIMIT=0,
    MODEL__KMAX__TEST__STUFF_AREA_LIMIT=0,
)


@pytest.fixture(scope="module")
def demo():
    return programs.load(programs.DEMO)


@pytest.fixture
def weights(tmp_path):
    model = build_model(ready_config("shapes/quickstart", SURE))
    torch.save({"model": model.state_dict()}, tmp_path / "random.pth")
    return str(tmp_path / "random.pth")


def picture(height=64, width=96):
    """Red on the left, blue on the right."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[:, : width // 2, 0] = image[:, width // 2 :, 2] = 255
    return Image.fromarray(image)


def test_good_and_bad_images(tmp_path, weights):
    folder = tmp_path / "in"
    folder.mkdir()
    picture().convert("L").save(folder / "gray.jpg")
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter clockwise
    picture().save(folder / "turned.jpg", exif=exif)
    picture().convert("RGBA").save(folder / "turned.png")
    (folder / "cut.jpg").write_bytes((folder / "gray.jpg").read_bytes()[:400])
    (folder / "text.txt").write_text("no image")
    missing = tmp_path / "missing.jpg"
    command = [programs.DEMO, "--input", folder, missing, folder / "turned.*", "--output", tmp_path / "out"]
    command += ["--config-file", "shapes/quickstart", "--weights", weights, "--assignments", "--opts", *SURE]
    done = programs.run(*command, KMAX_D2_CACHE=str(tmp_path / "cache"))

    assert done.returncode == 1, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 2 and "Traceback" not in done.stderr
    assert str(missing) in errors[0] and str(folder / "cut.jpg") in errors[1]
    *summaries, last = done.stdout.splitlines()
    assert last == f"3 of 5 images written to {tmp_path / 'out'}"
    assert len(summaries) == 3
    for line, name in zip(summaries, ("gray.jpg", "turned.jpg", "turned.png"), strict=True):
        assert line.startswith(f"{folder / name} -> {tmp_path / 'out'}")
        assert any(f"1 {category['name']}" in line for category in shapes.CATEGORIES)

    written = {file.name for file in (tmp_path / "out").iterdir()}
    stems = ("gray", "turned", "turned-2")
    assert written == {stem + ending for stem in stems for ending in (".png", "_assignments.png")}
    sizes = {stem: Image.open(tmp_path / "out" / f"{stem}.png").size for stem in stems}
    assert sizes == {"gray": (576, 384), "turned": (384, 576), "turned-2": (576, 384)}
    assert not (tmp_path / "cache").exists()  # nothing was drawn


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.WEIGTHS", "x.pth"], r"no option MODEL\.WEIGTHS - did you mean MODEL\.WEIGHTS\?"),
        (["MODEL.WEIGHTS", "nowhere.pth"], r"no checkpoint nowhere\.pth"),
        (["DATASETS.TEST", "()", "DATASETS.TRAIN", "()", "MODEL.KMAX.NUM_CLASSES", "9"], r"name a dataset"),
    ],
)
def test_options(demo, tmp_path, opts, message):
    picture().save(tmp_path / "image.png")
    arguments = ["--input", str(tmp_path / "image.png"), "--output", str(tmp_path / "out"), "--weights", "nowhere.pth"]
    with pytest.raises(UserError, match=message):
        demo.main([*arguments, "--opts", *map(str, options()), *opts])


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """A server in place of the model zoo's, which has nothing, and an empty cache."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    with published.server(tmp_path) as web:
        monkeypatch.setitem(model_zoo.WEIGHTS, "coco/r50", f"{web.address}/r50.tar.gz")
        yield web


@pytest.mark.parametrize("fault", ["absent", "page"])
def test_the_quickstarts_model_where_the_published_cannot_be_had(demo, zoo, tmp_path, capsys, caplog, fault):
    if fault == "page":
        (tmp_path / "r50.tar.gz").touch()
        zoo.fault = fault
    picture().save(tmp_path / "image.png")
    demo.main(["--input", str(tmp_path / "image.png"), "--output", str(tmp_path / "out")])
    shown = capsys.readouterr()
    said = [line for line in caplog.messages if " in place of " in line]
    assert len(said) == 1 and "r50.tar.gz" in said[0] and "error:" not in shown.err
    assert shown.out.splitlines()[-1] == f"1 of 1 images written to {tmp_path / 'out'}"
    # Whoever asks for the model gets it or an error.
    with pytest.raises(UserError, match=r"r50\.tar\.gz"):
        demo.main(["--input", str(tmp_path / "image.png"), "--config-file", "coco/r50"])


def test_find_images(tmp_path):
    for name in ("b.png", "a.JPG", "c[1].png"):
        picture().save(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    inputs = [str(tmp_path / name) for name in ("c[1].png", "*.png", "", "empty", "*.gif", "absent.png")]
    files, errors = find_images(inputs)
    assert [Path(file).name for file in files] == ["c[1].png", "b.png", "a.JPG"]
    assert [str(error).replace(str(tmp_path), "") for error in errors] == [
        "no images in the folder /empty",
        "no file matches /*.gif",
        "no file /absent.png",
    ]


def test_outputs_meet_neither_each_other_nor_an_input(demo, tmp_path):
    out = tmp_path / "out"
    files = [str(tmp_path / name) for name in ("a.png", "a.jpg", "b.jpg", "sub/b.jpg", "b-2.jpg")]
    stems = demo.name_outputs(files, [(tmp_path, ".png")])
    assert list(stems.values()) == ["a-2", "a-3", "b", "b-2", "b-2-2"]
    assert demo.name_outputs(files, [(out, ".png"), (tmp_path, ".png")]) == stems
    files = [str(tmp_path / "a_assignments.jpg"), str(tmp_path / "a.jpg"), "http://localhost/a.jpg?size=3"]
    stems = demo.name_outputs(files, [(out, ".png"), (out, "_assignments.png")])
    assert list(stems.values()) == ["a_assignments", "a-2", "a-3"]


def test_pictures_of_the_user_are_kept(demo, tmp_path, weights):
    """Also those beside an image, such as its mask."""
    command = ["--config-file", "shapes/quickstart", "--weights", weights, "--input", str(tmp_path / "photo.jpg")]
    command += ["--output", str(tmp_path), "--opts", *map(str, SURE)]
    picture().save(tmp_path / "photo.jpg")
    picture(8, 8).save(tmp_path / "photo.png")
    with pytest.raises(UserError, match=r"photo\.png exists and was not made by kmax_d2: .*--overwrite"):
        demo.main(command)
    assert Image.open(tmp_path / "photo.png").size == (8, 8)
    demo.main(["--overwrite", *command])
    demo.main(command)
    assert Image.open(tmp_path / "photo.png").size == (576, 384)


def test_addresses(demo, tmp_path, capsys):
    picture().save(tmp_path / "photo.png")
    with published.server(tmp_path) as web:
        inputs = [f"{web.address}/photo.png?size=2", str(tmp_path / "photo.png"), f"{web.address}/none.png"]
        command = ["--config-file", "shapes/quickstart", "--output", str(tmp_path / "out"), "--input", *inputs]
        with pytest.raises(SystemExit):
            demo.main([*command, "--save-json", str(tmp_path / "all.json")])
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1] == f"2 of 3 images written to {tmp_path / 'out'}"
    assert f"error: cannot download {inputs[2]}: HTTP Error 404" in shown.err
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"photo.png", "photo-2.png"}
    images = json.loads((tmp_path / "all.json").read_text())["images"]
    assert [image["file_name"] for image in images] == [inputs[0], "photo.png"]


@pytest.mark.slow
def test_an_interrupted_run_keeps_its_results(tmp_path):
    for number in range(40):
        picture().save(tmp_path / f"{number}.png")
    command = [programs.DEMO, "--input", tmp_path, "--output", tmp_path / "out", "--config-file", "shapes/quickstart"]
    with programs.start(*command, "--save-json", tmp_path / "all.json") as process:
        while process.poll() is None and len(list((tmp_path / "out").glob("*.png"))) < 3:
            time.sleep(0.05)
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert process.returncode and errors.endswith("\ninterrupted\n") and "Traceback" not in errors
    written = {entry["file_name"] for entry in json.loads((tmp_path / "all.json").read_text())["annotations"]}
    assert 2 <= len(written) < 40 and written == {file.name for file in (tmp_path / "all").iterdir()}


@pytest.mark.parametrize(
    "outputs",
    [
        ["--output", "{}/x", "--save-json", "{}/x.json"],
        ["--output", "{}/x", "--save-semantic", "{}/y/../x"],
        ["--output", "{}/x", "--save-json", "{}/y.json", "--save-instances", "{}/y.json"],
        ["--output", "{}/x", "--save-json", "{}/y.json", "--save-semantic", "{}/y"],
    ],
)
def test_two_outputs_of_one_name_are_refused_before_anything_is_written(outputs, tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    arguments = ["--input", str(tmp_path / "a.png"), *(part.format(tmp_path) for part in outputs)]
    assert "two outputs have one name" in programs.one_line(programs.load(programs.DEMO).main, arguments)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png"]


def test_a_camera_has_a_number_from_0(tmp_path):
    arguments = ["--webcam", "-1", "--output", str(tmp_path / "x.avi")]
    assert "--webcam is -1" in programs.one_line(programs.load(programs.DEMO).main, arguments)
