"""The web page as a visitor uses it. `make test-web` runs this: it needs gradio, playwright, and Chromium."""

import io
import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect
from pycocotools import mask as coco_mask

ROOT = Path(__file__).parents[2]
PHOTO = ROOT / "tests" / "data" / "coco_sample" / "000000439180.jpg"
PICTURE = "#clusters img"


def upload(page, name, content):
    page.set_input_files("#input input[type=file]", {"name": name, "mimeType": "image/png", "buffer": content})


def shown(page, picture=".tabitem:visible img"):
    """A picture, by default that of the chosen tab, as an array."""
    source = page.locator(picture).get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB"))


def move(page, step):
    """Moves the slider and returns the clusters that are then shown."""
    before = page.locator(PICTURE).get_attribute("src")
    page.fill("#step input[type=number]", str(step))
    page.press("#step input[type=number]", "Enter")
    expect(page.locator(PICTURE)).not_to_have_attribute("src", before)
    return shown(page, PICTURE)


def test_a_photo_is_segmented(page, tmp_path):
    upload(page, "photo.jpg", PHOTO.read_bytes())
    page.wait_for_selector(PICTURE)
    photo = Image.open(PHOTO)

    # Every kind of overlay.
    pictures = []
    for kind in ("Panoptic", "Instances", "Semantic"):
        page.get_by_role("tab", name=kind).click()
        pictures.append(shown(page))
    assert len({picture.tobytes() for picture in pictures}) == 3
    assert {picture.shape[0] % photo.height for picture in pictures} == {0}

    # The six decoders, whose clusters become finer, and the final clusters.
    expect(page.locator("#clusters")).to_contain_text("Decoder 1")
    first = shown(page, PICTURE)
    final = move(page, 7)
    expect(page.locator("#clusters")).to_contain_text("Final clusters")
    assert first.shape == final.shape and edges(final) > 2 * edges(first)
    move(page, 4)
    expect(page.locator("#clusters")).to_contain_text("Decoder 4")

    # The JSON file, against which clicks are held.
    page.get_by_text("Segments as JSON").click()
    with page.expect_download() as download:
        page.locator("#json").get_by_role("button", name="Download").click()
    content = json.loads(Path(download.value.path()).read_text())
    assert (content["height"], content["width"]) == (photo.height, photo.width) and content["segments_info"]

    page.get_by_role("tab", name="Panoptic").click()
    box = page.locator(".tabitem:visible img").bounding_box()
    for info in content["segments_info"]:
        mask = coco_mask.decode(info["segmentation"])
        assert mask.sum() == info["area"]
        y, x = inside(mask)
        click = {"x": (x + 0.5) / photo.width * box["width"], "y": (y + 0.5) / photo.height * box["height"]}
        page.locator(".tabitem:visible img").click(position=click)
        text = re.compile(rf"^{info['category']} \(.*score {info['score']:.2f}, {info['area']:,} pixels")
        expect(page.locator("#chosen textarea, #chosen input")).to_have_value(text)

    # The picture as a PNG.
    with page.expect_download() as download:
        page.locator(".tabitem:visible").get_by_label("Download").click()
    assert download.value.suggested_filename.endswith(".png")
    assert np.array_equal(np.asarray(Image.open(download.value.path()).convert("RGB")), pictures[0])


def edges(picture):
    """How many neighbors differ clearly."""
    return int((np.abs(np.diff(picture.astype(int), axis=1)).sum(axis=2) > 60).sum())


def inside(mask):
    """A point (y, x) deep inside of a mask."""
    depth = cv2.distanceTransform(np.pad(mask, 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
    return np.unravel_index(np.argmax(depth), depth.shape)


def huge():
    stream = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"no image", "Cannot read the image that you sent: it is not an image."),
        (PHOTO.read_bytes()[:2000], "Cannot read the image that you sent: "),
        (huge(), "The image has 10000 by 10000 pixels; at most 50,000,000 in all are allowed."),
        (bytes(21_000_000), "exceed the maximum allowed size"),
    ],
    ids=["text", "cut", "pixels", "bytes"],
)
def test_what_cannot_be_read_is_a_sentence(page, server, content, sentence):
    upload(page, "bad.png", content)
    toast = page.locator(".toast-body")
    expect(toast).to_contain_text(re.compile(sentence))
    visible = page.inner_text("body")
    assert str(server[1]) not in visible and str(ROOT) not in visible
    # The page goes on.
    page.reload()
    upload(page, "photo.jpg", PHOTO.read_bytes())
    page.wait_for_selector(PICTURE)


def test_a_model_that_cannot_be_had_is_a_sentence(page):
    upload(page, "photo.jpg", PHOTO.read_bytes())
    page.wait_for_selector(PICTURE)
    page.get_by_label("Model").click()
    page.get_by_role("option", name="cityscapes/r50").click()
    sentence = "The weights of cityscapes/r50 cannot be downloaded now: choose another model."
    expect(page.locator(".toast-body")).to_contain_text(sentence)
    # The page goes on, here with another model.
    panoptic = shown(page)
    before = page.locator(PICTURE).get_attribute("src")
    page.get_by_label("Model").click()
    page.get_by_role("option", name="shapes/quickstart").click()
    expect(page.locator(PICTURE)).not_to_have_attribute("src", before)
    assert not np.array_equal(shown(page), panoptic)


def test_the_camera(page):
    page.locator("#input").get_by_label("Capture from camera").click()
    page.locator("#input").get_by_text("Click to Access Webcam").click()
    page.wait_for_function("document.querySelector('#input video').videoWidth > 0")
    page.locator("#input").get_by_label("capture photo").click()
    page.wait_for_selector(PICTURE)


@pytest.mark.parametrize("route", ["gradio_api/file=", "file="])
@pytest.mark.parametrize("file", ["/etc/passwd", str(PHOTO), str(ROOT / "demo" / "web.py"), "../../etc/passwd"])
def test_no_file_of_the_server_is_readable(server, route, file):
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"{server[0]}/{route}{file}")
    assert error.value.code in (403, 404)


def test_no_path_of_the_server_is_in_the_page(server):
    for route in ("", "config", "gradio_api/info"):
        content = urllib.request.urlopen(f"{server[0]}/{route}").read().decode()
        assert str(ROOT) not in content and str(server[1]) not in content and "/site-packages" not in content


def test_a_request_cannot_name_a_file(server):
    """As a program may send it, without an upload before."""
    config = json.loads(urllib.request.urlopen(f"{server[0]}/config").read())
    number = next(d["id"] for d in config["dependencies"] if d["api_name"] == "show")
    data = ["camvid/street", {"path": str(PHOTO), "meta": {"_type": "gradio.FileData"}}]
    body = json.dumps({"data": data, "fn_index": number, "session_hash": "abc"}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server[0]}/gradio_api/queue/join", body, headers)
    urllib.request.urlopen(request).close()
    with urllib.request.urlopen(f"{server[0]}/gradio_api/queue/data?session_hash=abc") as stream:
        answers = [json.loads(line[6:]) for line in stream.read().decode().splitlines() if line.startswith("data:")]
    done = next(answer for answer in answers if answer["msg"] == "process_completed")
    assert not done["success"] and str(ROOT) not in json.dumps(answers)


def test_a_port_that_is_in_use_is_one_line(server):
    port = server[0].rpartition(":")[2]
    command = [sys.executable, ROOT / "demo" / "web.py", "--config-file", "shapes/quickstart", "--port", port]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"error: cannot listen at 127.0.0.1, port {port}: choose another --host or --port" in done.stderr
