"""Augmentations transform image and labels alike, and the mappers produce the model's inputs."""

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from PIL import Image, ImageEnhance, ImageOps
from small import options

from kmax_d2.data import PanopticTestMapper, PanopticTrainMapper, color
from kmax_d2.data.augmentation import RandomPadCrop, ResizeToFit
from kmax_d2.data.datasets import coco_panoptic, shapes
from kmax_d2.data.mapper import read_image, read_segments
from kmax_d2.engine import load_config
from kmax_d2.errors import UserError


@pytest.fixture(autouse=True)
def numpy_seeded():
    np.random.seed(0)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    shapes.write_split(folder, "val", 3, 9)
    return coco_panoptic.load(str(folder / "panoptic_val.json"), str(folder / "val"), str(folder / "panoptic_val"))


def mapper(mean=(127.5, 127.5, 127.5), **changes):
    """The training mapper with changed INPUT options."""
    changes = {"SCALE_RANGE": [1.0, 1.0]} | changes
    inputs = {f"INPUT__{name}": value for name, value in changes.items()}
    return PanopticTrainMapper(load_config("", options(**inputs, MODEL__PIXEL_MEAN=list(mean))))


def labelled(height, width):
    """An image and labels that encode the position of every pixel."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([y, x, np.zeros_like(y)], axis=-1).astype(np.uint8)
    return image, (y * 3 + x * 5).astype(np.float32) + 1


@pytest.mark.parametrize(
    ("size", "fit", "expected"),
    [((50, 100), (129, 129), (64, 129)), ((200, 100), (129, 129), (129, 64)), ((100, 200), (1025, 2049), (1024, 2049))],
)
def test_resize_to_fit_brings_the_longer_side_to_the_crop(size, fit, expected):
    transform = ResizeToFit(fit).get_transform(np.zeros((*size, 3), np.uint8))
    assert transform.apply_image(np.zeros((*size, 3), np.uint8)).shape[:2] == expected


def test_resize_draws_evenly_spaced_scales():
    augmentation = ResizeToFit((100, 100), (0.5, 2.0), 4)
    image = np.zeros((10, 10, 3), np.uint8)
    sides = {augmentation.get_transform(image).apply_image(image).shape[0] for _ in range(200)}
    assert sides == {50, 100, 150, 200}


@pytest.mark.parametrize("size", [(40, 90), (90, 40), (30, 30), (90, 90), (64, 64)])
def test_pad_and_crop_move_image_and_labels_alike(size):
    image, labels = labelled(*size)
    offsets = set()
    for _ in range(20):
        inputs = T.AugInput(image, sem_seg=labels)
        T.AugmentationList([RandomPadCrop((64, 64), 0)])(inputs)
        assert inputs.image.shape == (64, 64, 3)
        assert inputs.sem_seg.shape == (64, 64)
        real = inputs.sem_seg > 0
        assert (inputs.image[~real] == 0).all()
        assert real.sum() == min(size[0], 64) * min(size[1], 64)
        np.testing.assert_array_equal(
            inputs.sem_seg[real], inputs.image[real][:, 0] * 3.0 + inputs.image[real][:, 1] * 5.0 + 1
        )
        offsets.add((tuple(np.argwhere(real)[0]), tuple(inputs.image[real][0])))
    assert len(offsets) == 1 if size == (64, 64) else len(offsets) > 5


def test_color_policy_draws_each_operation_by_its_own_probability():
    image = np.random.RandomState(1).randint(0, 256, (8, 8, 3), dtype=np.uint8)
    changed = sum(not isinstance(color.ColorPolicy().get_transform(image), T.NoOpTransform) for _ in range(4000))
    # 1 - the mean over the pairs of (1 - p1)(1 - p2); Equalize has probability 0 in the second.
    expected = 1 - np.mean([(1 - first[1]) * (1 - second[1]) for first, second in color.POLICY])
    assert changed / 4000 == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(
    ("name", "level", "factor"), [("Contrast", 10, 1.9), ("Color", 9, 1.72), ("Sharpness", 1.4, 0.352)]
)
def test_levels_become_pillow_factors(name, level, factor):
    image = Image.fromarray(np.random.RandomState(2).randint(0, 256, (9, 9, 3), dtype=np.uint8))
    expected = getattr(ImageEnhance, name)(image).enhance(factor)
    assert np.array_equal(color.pillow_operation(name, level)(image), expected)


def test_solarize_and_equalize_are_pillows():
    image = Image.fromarray(np.random.RandomState(3).randint(0, 256, (9, 9, 3), dtype=np.uint8))
    assert np.array_equal(color.pillow_operation("Solarize", 7)(image), ImageOps.solarize(image, 179))
    assert np.array_equal(color.pillow_operation("Equalize", 9)(image), ImageOps.equalize(image))


def test_training_sample_has_the_annotated_masks(records):
    sample = mapper(CROP_SIZE=[161, 161], FIT_CROP=False, RANDOM_FLIP="none")(records[0])
    areas = torch.bincount(sample["segment_ids"].flatten() + 1)
    assert areas[0] == 161 * 161 - records[0]["height"] * records[0]["width"]
    assert areas[1:].tolist() == [segment["area"] for segment in records[0]["segments_info"]]
    assert sample["segment_classes"].tolist() == [segment["category_id"] for segment in records[0]["segments_info"]]
    padding = sample["segment_ids"] == -1
    assert (sample["image"][:, padding] == 127.5).all()
    pixels = sample["image"][:, ~padding].T.to(torch.uint8).numpy()
    assert np.array_equal(pixels, np.asarray(Image.open(records[0]["file_name"])).reshape(-1, 3))
    assert sample["segment_ids"].dtype == torch.int16


@pytest.mark.parametrize(
    ("mean", "dtype"), [([127.5, 127.5, 127.5], torch.float16), ([123.675, 116.28, 103.53], torch.float32)]
)
def test_padding_is_exactly_zero_after_scaling(records, mean, dtype):
    sample = mapper(mean, CROP_SIZE=[161, 161], FIT_CROP=False)(records[0])
    assert sample["image"].dtype == dtype
    scaled = sample["image"] - torch.tensor(mean).view(-1, 1, 1)
    padding = sample["segment_ids"] == -1
    assert padding.any()
    assert (scaled[:, padding] == 0).all()
    assert torch.equal(sample["image"][:, ~padding], sample["image"][:, ~padding].round()), "pixels are integers"


def test_a_vertical_flip_moves_image_and_labels_alike(records):
    """Some samples are upside down and otherwise equal."""
    size = [records[0]["height"], records[0]["width"]]
    flipping = mapper(CROP_SIZE=size, COLOR_POLICY=False, RANDOM_FLIP="vertical")
    samples = [flipping(records[0]) for _ in range(20)]
    first = samples[0]
    flipped = [not torch.equal(sample["image"], first["image"]) for sample in samples]
    assert any(flipped) and not all(flipped)
    for sample, turned in zip(samples, flipped, strict=True):
        for key, axis in (("image", 1), ("segment_ids", 0)):
            assert torch.equal(sample[key].flip(axis) if turned else sample[key], first[key])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CROP_SIZE", [65]),
        ("CROP_SIZE", [0, 65]),
        ("SCALE_RANGE", [1.0]),
        ("SCALE_RANGE", [2.0, 1.0]),
        ("SCALE_RANGE", [0.0, 1.0]),
        ("RANDOM_FLIP", "both"),
    ],
)
def test_options_that_do_not_fit_are_refused(name, value):
    with pytest.raises(UserError, match=rf"INPUT\.{name} is .*, but must be"):
        mapper(**{name: value})


def test_only_masks_with_a_pixel_and_their_classes_are_kept(tmp_path):
    ids = np.arange(1, 17).reshape(4, 4).repeat(20, 0).repeat(20, 1)
    record = write_record(tmp_path, ids, range(1, 17))
    for segment in record["segments_info"]:
        segment["category_id"] = segment["id"] + 100
    # The image encodes the same as the labels.
    Image.fromarray(np.stack([ids] * 3, -1).astype(np.uint8)).save(record["file_name"])
    cropping = mapper(CROP_SIZE=[33, 33], FIT_CROP=False, COLOR_POLICY=False)
    for _ in range(5):
        sample = cropping(record)
        assert sample["segment_ids"].unique().tolist() == list(range(len(sample["segment_classes"])))
        assert len(sample["segment_classes"]) < 16
        classes = sample["segment_classes"][sample["segment_ids"].long()]
        assert torch.equal(classes, sample["image"][0].long() + 100)


def test_crowds_are_void_and_stuff_of_one_class_is_one_mask(records):
    segments = [dict(segment) for segment in records[0]["segments_info"]]
    things = [segment for segment in segments if segment["isthing"]]
    stuff = [segment for segment in segments if not segment["isthing"]]
    things[0]["iscrowd"] = 1
    stuff[1]["category_id"] = stuff[0]["category_id"]
    sample = mapper(CROP_SIZE=[161, 161], FIT_CROP=False)(records[0] | {"segments_info": segments})
    areas = torch.bincount(sample["segment_ids"].flatten() + 1)
    assert len(sample["segment_classes"]) == len(segments) - 2
    assert areas[0] == 161 * 161 - records[0]["height"] * records[0]["width"] + things[0]["area"]
    merged = sample["segment_classes"].tolist().index(stuff[0]["category_id"])
    assert areas[1 + merged] == stuff[0]["area"] + stuff[1]["area"]


def write_record(folder, ids, segment_ids, mode="RGB"):
    """A dark image and a PNG of the ids (H, W), with things of these ids in the record."""
    colors = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    Image.fromarray(colors).convert(mode).save(folder / "ids.png")
    Image.new("RGB", ids.shape[::-1]).save(folder / "image.png")
    return {
        "file_name": str(folder / "image.png"),
        "pan_seg_file_name": str(folder / "ids.png"),
        "segments_info": [{"id": id_, "category_id": 0, "isthing": True} for id_ in segment_ids],
    }


def test_more_masks_than_a_byte_counts(tmp_path):
    ids = np.arange(1, 301).reshape(15, 20).repeat(4, 0).repeat(4, 1)
    sample = mapper(CROP_SIZE=[129, 129])(write_record(tmp_path, ids, range(1, 301)))
    assert sorted(set(sample["segment_ids"].flatten().tolist())) == list(range(-1, 300))


def test_ids_that_the_json_lacks_are_named(tmp_path):
    ids = np.array([[0, 5], [70000, 2**24 - 1]]).repeat(3, 0)
    with pytest.raises(UserError, match=r"ids\.png has segments that its JSON lacks: ids 5, 70000, 6 pixels in all"):
        read_segments(write_record(tmp_path, ids, [2**24 - 1]))
    labels, classes = read_segments(write_record(tmp_path, ids, [2**24 - 1, 5, 9, 70000]))
    assert labels.tolist() == [[0, 2]] * 3 + [[4, 1]] * 3
    assert len(classes) == 4


@pytest.mark.parametrize("id_", [0, -1, 2**24])
def test_ids_that_a_png_cannot_encode_are_refused(tmp_path, id_):
    with pytest.raises(UserError, match=rf"a segment of .*ids\.png has the id {id_} in the JSON"):
        read_segments(write_record(tmp_path, np.ones((4, 4), int), [1, id_]))


def test_panoptic_png_with_an_alpha_channel_is_read_without_it(tmp_path):
    ids = np.array([[1, 2], [300, 0]])
    assert read_segments(write_record(tmp_path, ids, [1, 2, 300], "RGBA"))[0].tolist() == [[1, 2], [3, 0]]


def test_same_seed_gives_the_same_sample(records):
    random_scale = mapper(SCALE_RANGE=[0.5, 2.0])
    samples = []
    for seed in (7, 7, 8):
        np.random.seed(seed)
        samples.append(random_scale(records[1]))
    first, again, other = samples
    assert torch.equal(first["image"], again["image"])
    assert torch.equal(first["segment_ids"], again["segment_ids"])
    assert not torch.equal(first["segment_ids"], other["segment_ids"])


def test_test_sample_fits_the_crop_and_keeps_its_original_size(records):
    record = records[0]
    sample = PanopticTestMapper(load_config("", options(INPUT__CROP_SIZE=[65, 65])))(record)
    assert max(sample["image"].shape[1:]) == 65
    assert (sample["height"], sample["width"]) == (record["height"], record["width"])
    assert sample["image"].dtype == torch.uint8


@pytest.mark.parametrize("mode", ["RGBA", "CMYK", "P", "LA", "L"])
def test_other_color_modes_are_read_as_their_colors(tmp_path, mode):
    color = (102, 102, 102) if mode in ("L", "LA") else (102, 51, 204)
    file = str(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"))
    Image.new("RGB", (16, 16), color).convert(mode).save(file)
    assert np.abs(read_image({"file_name": file}).astype(int) - color).max() <= 3


def test_sizes_unlike_the_record_are_refused(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(tmp_path / "turned.jpg", exif=exif)
    record = {"file_name": str(tmp_path / "turned.jpg"), "width": 6, "height": 4}
    with pytest.raises(UserError, match=r"turned\.jpg is 4×6 \(with its EXIF orientation\), but its record says 6×4"):
        read_image(record)
    sample = PanopticTestMapper(size=None)(record | {"width": 4, "height": 6})
    assert sample["image"].shape == (3, 6, 4)
