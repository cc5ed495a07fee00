"""The predictor: one call from anything that holds an image to its result."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import supervision
import torch
import yaml
from detectron2.data import DatasetCatalog
from PIL import ExifTags, Image
from published import server
from runs import write_own_data
from small import build, options

import kmax_d2
from kmax_d2 import model_zoo
from kmax_d2.checkpoint.origin import describe_model, merge_checkpoint
from kmax_d2.data.datasets import shapes
from kmax_d2.engine import Trainer, load_config, ready_config
from kmax_d2.errors import UserError
from kmax_d2.inference import Predictor
from kmax_d2.inference.sources import read_source


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Four drawn images."""
    folder = tmp_path_factory.mktemp("drawn")
    shapes.write_split(folder, "val", 4, 4)
    return sorted((folder / "val").iterdir())


@pytest.fixture(scope="module")
def predict():
    return kmax_d2.load("shapes/quickstart", device="cpu")


def test_any_source_gives_the_same_result(predict, files, tmp_path):
    file = tmp_path / "image.png"
    image = np.asarray(Image.open(files[0]).convert("RGB"))
    Image.fromarray(image).save(file)
    expected = predict(str(file))
    assert len(expected.panoptic.segments) > 1 and expected.source == str(file)
    with server(tmp_path) as web:
        sources = [file, f"{web.address}/image.png", Image.open(file), image, torch.tensor(image).permute(2, 0, 1)]
        results = [predict(source) for source in sources]
        address = web.address
    for result in results:
        assert np.array_equal(result.panoptic.ids, expected.panoptic.ids)
        assert np.array_equal(result.image, image)
    assert [result.source for result in results] == [str(file), f"{address}/image.png", "", "", ""]


def test_the_result_is_that_of_the_model(predict, files):
    result = predict(files[1])
    inputs = predict.mapper({"file_name": str(files[1])})
    with torch.no_grad():
        output = predict.model([inputs])[0]
    assert np.array_equal(result.panoptic.ids, output["panoptic_seg"][0])
    assert np.array_equal(result.semantic, output["semantic"])
    assert torch.equal(result.instances.pred_masks, output["instances"].pred_masks)
    masks = predict.model.predict(inputs["image"][None])["mask_logits"][0]
    assert np.array_equal(result.clusters[-1], masks.argmax(0))
    assert len(result.clusters) == 1 + len(predict.model.transformer_decoder.layers)
    for segment in result.panoptic.segments:
        rows, columns = np.nonzero(result.panoptic.ids == segment.id)
        assert segment.area == len(rows) and 0 < segment.score <= 1
        assert segment.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert segment.class_name == predict.class_names[segment.class_id]
        assert segment.is_thing == (segment.class_name in [c["name"] for c in shapes.CATEGORIES if c["isthing"]])


def test_lists_folders_and_threads_give_what_one_image_gives(predict, files):
    alone = [predict(file).panoptic.ids for file in files]
    with ThreadPoolExecutor(4) as pool:
        threads = [result.panoptic.ids for result in pool.map(predict, files[::-1])][::-1]
    together = [result.panoptic.ids for result in predict(files[0].parent, batch_size=3)]
    listed = [result.panoptic.ids for result in predict(files, batch_size=2)]
    for others in (threads, together, listed):
        assert all(np.array_equal(one, other) for one, other in zip(alone, others, strict=True))


def test_two_precisions_at_once(predict, files):
    """Precision is a setting of the process: neither predictor may run in the other's."""
    rounded = kmax_d2.load("shapes/quickstart", device="cpu", precision="bfloat16")
    alone = [(each(files[0]).panoptic.ids, each(files[0]).panoptic.segments) for each in (predict, rounded)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda each: each(files[0]), [predict, rounded] * 4))
    for index, result in enumerate(results):
        assert np.array_equal(result.panoptic.ids, alone[index % 2][0])
        assert result.panoptic.segments == alone[index % 2][1]
    assert alone[0][1] != alone[1][1]


def test_pictures_and_coco(predict, files, tmp_path):
    result = predict(files[2])
    height, width = result.image.shape[:2]
    for kind in ("panoptic", "instances", "semantic"):
        picture = result.draw(kind)
        assert picture.shape[0] % height == picture.shape[1] % width == 0
        assert np.ptp(picture) > 0
    result.save(tmp_path / "out.png", "clusters")
    result.save(tmp_path / "out.png")  # over our own
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out.png")), result.draw())
    (tmp_path / "mine.png").write_bytes(files[2].read_bytes())
    with pytest.raises(UserError, match="was not made by kmax_d2"):
        result.save(tmp_path / "mine.png")
    with pytest.raises(UserError, match="no picture panoptics - did you mean panoptic"):
        result.draw("panoptics")
    annotation = json.loads(json.dumps(result.to_coco()))
    ids = {category["id"]: category["name"] for category in shapes.CATEGORIES}
    for info, segment in zip(annotation["segments_info"], result.panoptic.segments, strict=True):
        assert ids[info["category_id"]] == segment.class_name
        assert (info["bbox"][2], info["area"]) == (segment.box[2] - segment.box[0], segment.area)


def test_detections_of_supervision(predict, files):
    result = predict(files[2])
    detections = result.to_supervision()
    assert isinstance(detections, supervision.Detections)
    segments = result.panoptic.segments
    assert len(detections) == len(segments) > 1
    assert detections.data["class_name"].tolist() == [segment.class_name for segment in segments]
    assert detections.mask.sum((1, 2)).tolist() == [segment.area for segment in segments]
    inclusive = supervision.mask_to_xyxy(detections.mask)  # of the last pixels
    assert np.array_equal(detections.xyxy, inclusive + np.array([0, 0, 1, 1]))
    picture = supervision.MaskAnnotator().annotate(result.image[..., ::-1].copy(), detections)
    assert (picture != result.image[..., ::-1]).any()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two iterations with averaged weights on own data, which are gone afterwards."""
    folder = tmp_path_factory.mktemp("trained")
    own_data = write_own_data(folder / "data")
    ends = {"SOLVER__MAX_ITER": 2, "SOLVER__EMA__ENABLED": True, "TEST__EVAL_PERIOD": 0}
    data = ["DATASETS.OWN_TRAIN", own_data["train"], "DATASETS.OWN_TEST", own_data["val"]]
    cfg = ready_config("", options(OUTPUT_DIR=str(folder / "run"), **ends), data)
    trainer = Trainer(cfg)
    trainer.train()
    (folder / "data").rename(folder / "elsewhere")
    return folder / "run", folder / "elsewhere" / "val", trainer


ALONE = """
import sys, kmax_d2
for file in sys.argv[2:]:
    predict = kmax_d2.load(file, device="cpu")
    result = predict(sys.argv[1])
    print(predict.class_names, predict.metadata.stuff_colors[0], int(result.semantic.sum()))
"""


def test_a_checkpoint_is_enough(trained):
    """In another process, and without the data that it was trained on."""
    folder, images, trainer = trained
    image = str(next(images.iterdir()))
    checkpoints = [str(folder / "model_final.pth"), str(folder / "model_final_ema.pth")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ALONE, image, *checkpoints]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    expected = [Predictor(trainer.cfg, model)(image) for model in (trainer.model, trainer.final_model)]
    names, color = [c["name"] for c in shapes.CATEGORIES], shapes.CATEGORIES[0]["color"]
    assert done.stdout.splitlines() == [f"{names} {list(color)} {int(each.semantic.sum())}" for each in expected]


def test_what_a_checkpoint_tells(trained):
    folder, _, trainer = trained
    content = torch.load(folder / "model_final.pth", weights_only=True)["kmax_d2"]
    assert content == describe_model(trainer.cfg)["kmax_d2"]
    assert str(folder.parent) not in json.dumps(content)  # nothing of the machine
    cfg = load_config("")
    merge_checkpoint(cfg, str(folder / "model_final.pth"))
    assert cfg.MODEL.KMAX.RESNET.WIDTHS == trainer.cfg.MODEL.KMAX.RESNET.WIDTHS
    assert cfg.DATASETS.TEST[0] in DatasetCatalog


def test_a_checkpoint_made_with_another_version_of_detectron2(trained, tmp_path):
    content = torch.load(trained[0] / "model_final.pth", weights_only=True)
    saved = yaml.safe_load(content["kmax_d2"]["options"])
    saved["MODEL"]["ROI_BOX_HEAD"]["OF_ANOTHER_VERSION"] = 0.5
    content["kmax_d2"]["options"] = yaml.safe_dump(saved)
    torch.save(content, tmp_path / "other.pth")
    one, other = load_config(str(trained[0] / "model_final.pth")), load_config(str(tmp_path / "other.pth"))
    assert one.MODEL.KMAX == other.MODEL.KMAX != load_config("").MODEL.KMAX


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("coco/r5", {}, "no config file coco/r5 - did you mean coco/r50"),
        ("none.pth", {}, "no checkpoint none.pth"),
        ("hf://owner/model.pth", {}, "must be hf://OWNER/REPOSITORY/FILE"),
        ("shapes/quickstart", {"weights": "none.pth"}, "no checkpoint none.pth"),
        ("shapes/quickstart", {"precision": "float8"}, "TEST.PRECISION is float8, but must be"),
        ("shapes/quickstart", {"device": "gpu"}, "MODEL.DEVICE is gpu, but must be"),
    ],
)
def test_what_cannot_be_loaded(name, options, message):
    with pytest.raises(UserError, match=message) as error:
        kmax_d2.load(name, **options)
    assert "\n" not in str(error.value)


def test_weights_without_their_config(tmp_path):
    torch.save({"model": {"weight": torch.zeros(3)}}, tmp_path / "old.pth")
    with pytest.raises(UserError, match="has weights, but not their config: name the config"):
        kmax_d2.load(str(tmp_path / "old.pth"))


def test_images_that_are_none(predict, tmp_path, caplog):
    (tmp_path / "empty.png").touch()
    Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(tmp_path / "deep.png")
    wrong = {
        "none.png": "No such file",
        str(tmp_path / "empty.png"): "is not an image",
        str(tmp_path / "deep.png"): "more than 8 bits",
        "http://127.0.0.1:9/image.png": "cannot download http://127.0.0.1:9/image.png",
    }
    for source, message in wrong.items():
        with pytest.raises(UserError, match=message):
            predict(source)
    for source in (np.zeros((4, 4, 3)), torch.zeros(3, 4, 4), np.zeros((0, 4, 3), np.uint8), 7):
        with pytest.raises(UserError, match="no image: a path, an address"):
            predict(source)
    frames = [Image.new("RGB", (40, 30), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    assert tuple(predict(tmp_path / "two.gif").image[0, 0]) == (255, 0, 0)
    assert "has 2 frames: only the first is used" in caplog.text
    for mode in ("L", "CMYK", "RGBA", "P", "1"):
        assert predict(Image.new(mode, (1, 1))).panoptic.ids.shape == (1, 1)


def turned(folder):
    """A photo with an EXIF orientation, as a file and in memory."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8))
    image.save(folder / "photo.png", exif=exif)
    return str(folder / "photo.png")


def test_an_image_in_memory_is_read_as_its_file(tmp_path):
    file = turned(tmp_path)
    from_file, _ = read_source(file)
    assert from_file.shape == (64, 40, 3)
    with Image.open(file) as image:
        assert np.array_equal(read_source(image)[0], from_file)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "RGBa", "La"])
def test_images_of_every_mode_in_memory(mode):
    image = Image.fromarray(np.full((9, 11, 3), (200, 30, 60), np.uint8)).convert("RGBA")
    base = {"RGBa": "RGBA", "La": "LA", "PA": "P", "HSV": "RGB", "YCbCr": "RGB", "CMYK": "RGB"}.get(mode, mode)
    image = image.convert(base)
    pixels = read_source(image if base == mode else image.convert(mode))[0]
    assert pixels.shape == (9, 11, 3) and pixels.dtype == np.uint8
    if mode in ("RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "RGBa"):
        assert np.abs(pixels.astype(int) - (200, 30, 60)).max() <= 6


@pytest.mark.parametrize("mode", ["I", "F", "I;16"])
def test_images_whose_colors_are_not_of_8_bits_are_one_line(mode):
    with pytest.raises(UserError, match="image of PIL"):
        read_source(Image.new(mode, (11, 9)))


@pytest.mark.parametrize("name", ["shapes/quickstart", "camvid/street"])
def test_included_models_by_every_way(name):
    """Their weights know their classes, which the configs alone do not."""
    model = model_zoo.get(name, trained=True, device="cpu")
    cfg = model_zoo.get_config(name, trained=True)
    predict = kmax_d2.load(Path(model_zoo.get_checkpoint_url(name)), device="cpu")
    assert len(model.merging.is_thing) == cfg.MODEL.KMAX.NUM_CLASSES == len(predict.class_names)
    assert all(torch.equal(w, predict.model.state_dict()[n]) for n, w in model.state_dict().items() if "centers" in n)


def test_results_that_a_checkpoint_switches_off_are_there(tmp_path):
    off = [part for kind in ("PANOPTIC", "SEMANTIC", "INSTANCE") for part in (f"MODEL.KMAX.TEST.{kind}_ON", False)]
    predict = kmax_d2.load("camvid/street", device="cpu", options=off)
    image = np.random.default_rng(0).integers(0, 256, (96, 130, 3), dtype=np.uint8)
    result, tiled = predict(image), predict.tiled(image, 96)
    assert result.semantic.shape == tiled.semantic.shape == (96, 130)
    assert tiled.semantic.any() and len(result.instances) >= 0


def test_prediction_leaves_the_modes_of_modules_alone():
    model = build("coco/base").train()
    model.backbone.eval()
    model.predict(torch.zeros(1, 3, 33, 33))
    assert model.training and not any(module.training for module in model.backbone.modules())
