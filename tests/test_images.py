"""Image files are read whole or are an error, and datasets are looked at before a run starts."""

import os

import numpy as np
import pytest
from PIL import Image

from kmax_d2.data.check import require_readable
from kmax_d2.errors import UserError
from kmax_d2.images import read_rgb, read_size


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


def test_images_are_upright_rgb(tmp_path, pixels):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_rgb(str(tmp_path / "a.png")), np.rot90(pixels, -1))
    assert read_size(str(tmp_path / "a.png")) == (60, 40)


@pytest.mark.parametrize("place", [0.2, 0.5, 0.8, 0.999])
@pytest.mark.parametrize("suffix", ["png", "bmp"])
def test_a_damaged_png_is_an_error_wherever_the_damage_is(tmp_path, pixels, place, suffix):
    file = tmp_path / f"a.{suffix}"
    Image.fromarray(pixels).save(file)
    content = bytearray(file.read_bytes())
    if suffix == "png":
        content[int(place * len(content))] ^= 0x55
    else:
        del content[int(place * len(content)) :]
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"^cannot read the image .*a\.{suffix}: "):
        read_rgb(str(file))
    assert read_size(str(file)) == (40, 60), "more than the header was read"


def test_what_is_not_a_file_is_an_error_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    for name in ("fifo.png", ""):
        with pytest.raises(UserError, match="it is not a file"):
            read_rgb(str(tmp_path / name))


def write_record(folder, pixels, size=(40, 60), png="RGB"):
    Image.fromarray(pixels).save(folder / "a.jpg")
    Image.new(png, (60, 40)).save(folder / "a.png")
    names = {"file_name": str(folder / "a.jpg"), "pan_seg_file_name": str(folder / "a.png")}
    return names | {"height": size[0], "width": size[1]}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"size": (40, 61)}, r"a\.jpg is 60×40, the JSON says 61×40"),
        ({"png": "L"}, r"the panoptic PNG .*a\.png has no colors: its mode is L, not RGB"),
        ({"png": "I;16"}, r"the panoptic PNG .*a\.png has more than 8 bits per channel; convert it to 8 bits first"),
    ],
)
def test_unusable_samples_are_found_by_their_headers(tmp_path, pixels, changes, fault):
    require_readable(["shapes_val"], [write_record(tmp_path, pixels)])
    with pytest.raises(UserError, match=rf"^the dataset shapes_val cannot be used: .*{fault}; python"):
        require_readable(["shapes_val"], [write_record(tmp_path, pixels, **changes)])


def test_missing_and_empty_files_are_found(tmp_path, pixels):
    record = write_record(tmp_path, pixels)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot be used: cannot read .*b\.jpg: No such file.*and 1 more faults"):
        require_readable(
            ["shapes_val"], [{"file_name": str(tmp_path / "b.jpg")}, record, {"file_name": record["file_name"]}]
        )
