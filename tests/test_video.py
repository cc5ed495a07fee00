"""Videos that OpenCV made: read, segmented, written, interrupted, and damaged."""

import os
import signal
import time

import cv2
import numpy as np
import programs
import pytest

from kmax_d2.errors import UserError
from kmax_d2.files import require_own
from kmax_d2.inference.video import FORMATS, VideoReader, VideoWriter, video_file

SIZE = (48, 66)  # height and width
QUICK = ["--config-file", "shapes/quickstart"]


def frame(number):
    """Brighter in every frame, and red on the left."""
    image = np.full((*SIZE, 3), 10 * number % 200, np.uint8)
    image[:, : SIZE[1] // 2, 0] = 255
    return image


def write(file, count=12, rate=8.0):
    with VideoWriter(file, rate) as writer:
        for number in range(count):
            writer.write(frame(number))
    return str(file)


@pytest.fixture(scope="module")
def demo():
    return programs.load(programs.DEMO)


@pytest.mark.parametrize("suffix", FORMATS)
def test_what_is_written_is_read(tmp_path, suffix):
    reader = VideoReader(write(tmp_path / f"a{suffix}"))
    assert (reader.rate, reader.count) == (8.0, 12)
    for number, image in enumerate(reader):
        assert image.shape == (*SIZE, 3)
        assert np.abs(image[:, :20].mean((0, 1)) - frame(number)[0, 0]).max() < 12
    assert number == 11
    require_own([tmp_path / f"a{suffix}"])  # which is marked as ours


@pytest.mark.parametrize("suffix", [".avi", ".mkv"])
def test_a_killed_program_leaves_a_video(tmp_path, suffix):
    file, noise = tmp_path / f"a{suffix}", np.random.default_rng(0).integers(0, 255, (60, 144, 192, 3), np.uint8)
    process = os.fork()
    if not process:
        with VideoWriter(file, 8.0) as writer:
            for image in noise:
                writer.write(image)
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL
    assert len(list(VideoReader(str(file)))) > 30


def test_a_video_from_a_video(demo, tmp_path, capsys):
    source, folder = write(tmp_path / "street.avi", 4), tmp_path / "out"
    demo.main(["--video-input", source, "--output", str(folder), *QUICK])
    assert f"-> {folder / 'street.avi'}: 4 frames, " in capsys.readouterr().out
    reader = VideoReader(str(folder / "street.avi"))
    images = list(reader)
    assert (reader.rate, len(images)) == (8.0, 4) and images[0].shape == (8 * SIZE[0], 8 * SIZE[1], 3)
    demo.main(["--video-input", source, "--output", str(tmp_path), "--tile", "64", *QUICK])  # beside itself
    assert len(list(VideoReader(str(tmp_path / "street-2.avi")))) == len(list(VideoReader(source))) == 4


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interrupted_run_leaves_a_video(tmp_path, number):
    file = tmp_path / "out.mp4"
    command = [programs.DEMO, "--video-input", write(tmp_path / "long.avi", 2000), *QUICK, "--output", file]
    with programs.start(*command) as process:
        while process.poll() is None and not (file.exists() and file.stat().st_size):
            time.sleep(0.1)
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and errors.endswith("\ninterrupted\n") and "Traceback" not in errors
    assert 0 < len(list(VideoReader(str(file)))) < 2000
    assert " frames a second" in output


def test_a_video_that_ends_early(demo, tmp_path):
    source = tmp_path / "cut.avi"
    write(source, 24)
    source.write_bytes(source.read_bytes()[: source.stat().st_size * 2 // 3])
    with pytest.raises(UserError, match=r"the video .*cut\.avi ends early: \d+ of 24 frames can be read"):
        demo.main(["--video-input", str(source), "--output", str(tmp_path / "out"), *QUICK])
    assert 2 < len(list(VideoReader(str(tmp_path / "out" / "cut.avi")))) < 20


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--video-input {}/none.avi", "no video file {}/none.avi"),
        ("--video-input {}/text.avi", "cannot open the video {}/text.avi: it is damaged or no video"),
        ("--webcam 97", "cannot open the camera 97"),
        ("--video-input {}/a.avi --output {}/a.gif", "unknown video format .gif of {}/a.gif"),
        ("--video-input {}/a.avi --output {}/a.avi", "{}/a.avi is the input: choose another --output"),
        ("--video-input {}/a.avi --output {}/users.avi", "{}/users.avi exists and was not made by kmax_d2"),
        ("--video-input {}/a.avi --save-json a.json", "--save-json, --save-instances, --save-semantic, and"),
        ("--video-input {}/a.avi --webcam", "status 2"),
        ("", "status 2"),
    ],
)
def test_what_cannot_work(demo, tmp_path, capfd, arguments, line):
    write(tmp_path / "a.avi")
    (tmp_path / "text.avi").write_text("no video")
    (tmp_path / "users.avi").write_text("a video of the user")
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    words = [*arguments.replace("{}", str(tmp_path)).split(), *QUICK]
    words += [] if "--output" in words else ["--output", str(tmp_path / "out")]
    found = programs.one_line(demo.main, words)
    assert found and line.replace("{}", str(tmp_path)) in found
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert "status 2" in line or not capfd.readouterr().err.strip()


def test_names_of_videos(tmp_path):
    assert video_file(tmp_path, "a") == tmp_path / "a.avi"
    assert video_file(tmp_path / "new", "a") == tmp_path / "new" / "a.avi"
    assert video_file(tmp_path / "b.MP4", "a") == tmp_path / "b.MP4"
    with pytest.raises(UserError, match="cannot write the video"), VideoWriter(tmp_path / "a.avi", 0.0) as writer:
        (tmp_path / "a.avi").mkdir()
        writer.write(cv2.cvtColor(frame(0), cv2.COLOR_RGB2BGR))
