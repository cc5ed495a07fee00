"""The demo as a user runs it: images in, overlays out, every fault named."""

from pathlib import Path

import numpy as np
import programs
import published
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image
from small import options

import kmax_d2
from kmax_d2 import model_zoo
from kmax_d2.data.datasets import shapes
from kmax_d2.engine import ready_config
from kmax_d2.engine.setup import dataset_metadata
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
    # In the page's first panel, the input, red has become the upper half.
    page = np.asarray(Image.open(tmp_path / "out" / "turned_assignments.png"))
    assert np.allclose(page[150, 150], (255, 0, 0), atol=3) and np.allclose(page[500, 150], (0, 0, 255), atol=3)
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


def test_weights_that_the_project_has_are_the_default(demo):
    command = ["--input", "image.png", "--config-file", "shapes/quickstart"]
    included = Path(demo.setup(demo.PARSER.parse(command)).MODEL.WEIGHTS)
    assert included.samefile(Path(kmax_d2.__file__).parent / "assets" / "quickstart.pth")
    own = demo.setup(demo.PARSER.parse([*command, "--weights", "own.pth"]))
    assert own.MODEL.WEIGHTS == "own.pth"


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """A server in place of the model zoo's, which has nothing, and an empty cache."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    with published.server(tmp_path) as web:
        monkeypatch.setattr(model_zoo, "ADDRESS", web.address)
        yield web


@pytest.mark.parametrize("fault", ["absent", "page"])
def test_the_quickstarts_model_where_the_published_cannot_be_had(demo, zoo, tmp_path, capsys, fault):
    if fault == "page":
        (tmp_path / "kmax_resnet50_coco_train.tar.gz").touch()
        zoo.fault = fault
    picture().save(tmp_path / "image.png")
    demo.main(["--input", str(tmp_path / "image.png"), "--output", str(tmp_path / "out")])
    shown = capsys.readouterr()
    said = [line for line in shown.err.splitlines() if "model in place of" in line]
    assert len(said) == 1 and "kmax_resnet50_coco_train.tar.gz" in said[0] and "error:" not in shown.err
    assert shown.out.splitlines()[-1] == f"1 of 1 images written to {tmp_path / 'out'}"
    # Whoever asks for the model gets it or an error.
    with pytest.raises(UserError, match=r"kmax_resnet50_coco_train\.tar\.gz"):
        demo.main(["--input", str(tmp_path / "image.png"), "--config-file", "coco/r50"])


def test_which_weights_are_taken(demo, tmp_path):
    def weights(*arguments):
        return demo.setup(demo.PARSER.parse(["--input", "x.jpg", *arguments])).MODEL.WEIGHTS

    published = model_zoo.get_checkpoint_url("coco/r50")
    assert weights() == weights("--config-file", "configs/coco/r50.yaml") == published
    assert weights("--opts", "MODEL.WEIGHTS", "a.pth") == weights("--weights", "a.pth") == "a.pth"
    (tmp_path / "own.yaml").write_text(
        "DATASETS:\n  TEST: ('shapes_val',)\nMODEL:\n  WEIGHTS: own.pth\n  KMAX:\n    NUM_CLASSES: 0\n"
    )
    assert weights("--config-file", str(tmp_path / "own.yaml")) == "own.pth"


def test_coco_needs_no_files_of_the_dataset(demo):
    cfg = demo.setup(demo.PARSER.parse(["--input", "x.jpg", "--config-file", "coco/r50", "--weights", "x.pth"]))
    assert cfg.MODEL.KMAX.NUM_CLASSES == 133 and cfg.MODEL.WEIGHTS == "x.pth"
    names = dataset_metadata(cfg).stuff_classes
    assert demo.describe([{"category_id": 0}, {"category_id": 2}, {"category_id": 0}], names) == "2 person, 1 car"
    assert demo.describe([], names) == "no segments"


def test_find_images(tmp_path):
    for name in ("b.png", "a.JPG", "c[1].png"):
        picture().save(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    inputs = [str(tmp_path / name) for name in ("c[1].png", "*.png", "", "empty", "*.gif", "absent.png")]
    files, errors = find_images(inputs)
    assert [file.name for file in files] == ["c[1].png", "b.png", "a.JPG"]
    assert [str(error).replace(str(tmp_path), "") for error in errors] == [
        "no images in the folder /empty",
        "no file matches /*.gif",
        "no file /absent.png",
    ]


def test_outputs_meet_neither_each_other_nor_an_input(demo, tmp_path):
    files = [tmp_path / name for name in ("a.png", "a.jpg", "b.jpg", "sub/b.jpg", "b-2.jpg")]
    stems = demo.name_outputs(files, tmp_path, [".png"])
    assert list(stems.values()) == ["a-2", "a-3", "b", "b-2", "b-2-2"]
    files = [tmp_path / "a_assignments.jpg", tmp_path / "a.jpg"]
    stems = demo.name_outputs(files, tmp_path / "out", [".png", "_assignments.png"])
    assert list(stems.values()) == ["a_assignments", "a-2"]


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
