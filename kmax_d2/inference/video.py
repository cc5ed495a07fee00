"""Reads and writes videos with OpenCV."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from ..errors import UserError
from ..files import MARK, make_folder

# For each format the codec, and the header of a chunk with a text that players pass over. Of an .avi or .mkv with
# Motion JPEG, the frames can be played however the program ends; an .mp4 is far smaller but needs its end.
FORMATS = {
    ".avi": ("MJPG", b"JUNK" + len(MARK).to_bytes(4, "little")),
    ".mkv": ("MJPG", b"\xec" + bytes([0x80 | len(MARK)])),
    ".mp4": ("mp4v", (8 + len(MARK)).to_bytes(4, "big") + b"free"),
}
DEFAULT_RATE = 25.0  # frames a second where the source does not say
# What OpenCV and FFmpeg say on the terminal about a damaged file, the UserError says in a line.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
(getattr(cv2, "setLogLevel", None) or cv2.utils.logging.setLogLevel)(0)


class VideoReader:
    """The frames of a video file, or of a camera by its number: an iterator over (H, W, 3) uint8, RGB.

    Attributes:
        rate: frames a second.
        count: number of frames, 0 if unknown.

    Raises:
        UserError: it cannot be opened; or, after the last frame, a file has fewer frames than it says.
    """

    def __init__(self, source: str | int):
        is_file = isinstance(source, str)
        if is_file and not os.path.isfile(source):
            raise UserError(f"no video file {source}")
        self._name = f"video {source}" if is_file else f"camera {source}"
        self._capture = cv2.VideoCapture(source)
        if not self._capture.isOpened():
            raise UserError(f"cannot open the {self._name}" + (": it is damaged or no video" if is_file else ""))
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.rate = rate if 0 < rate < 1000 else DEFAULT_RATE
        self.count = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))) if is_file else 0

    def __iter__(self) -> Iterator[np.ndarray]:
        read = 0
        while True:
            there, frame = self._capture.read()
            if not there:
                break
            read += 1
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        self._capture.release()
        if not read or self.count - read > max(2, self.count // 20):  # the number is an estimate for some formats
            raise UserError(f"the {self._name} ends early: {read} of {self.count or 'its'} frames can be read")


def video_file(output: str | Path, stem: str) -> Path:
    """Returns the file that an output names: itself, or in a folder `stem`.avi. Raises UserError for other formats."""
    output = Path(output)
    if output.is_dir() or not output.suffix:
        return output / f"{stem}.avi"
    if output.suffix.lower() not in FORMATS:
        known = ", ".join(FORMATS)
        raise UserError(f"unknown video format {output.suffix} of {output}: name a folder, or a file in {known}")
    return output


class VideoWriter:
    """Writes frames to a file as they come. Once its block ends, also by an exception, it can be played.

    Args:
        file: with a suffix of FORMATS.
        rate: frames a second; may be changed before the first frame.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, file: Path, rate: float):
        self.file, self.rate = file, rate
        self._writer: cv2.VideoWriter | None = None

    def __enter__(self) -> VideoWriter:
        make_folder(self.file.parent)
        return self

    def write(self, frame: np.ndarray) -> None:
        """Adds a frame (H, W, 3), uint8, RGB, of the size of the first."""
        codec, _ = FORMATS[self.file.suffix.lower()]
        if self._writer is None:
            size = frame.shape[1], frame.shape[0]
            self._writer = cv2.VideoWriter(str(self.file), cv2.VideoWriter.fourcc(*codec), self.rate, size)
        if not self._writer.isOpened():
            raise UserError(f"cannot write the video {self.file}")
        self._writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))

    def __exit__(self, *error: object) -> None:
        if self._writer is not None and self._writer.isOpened():
            self._writer.release()
            with open(self.file, "ab") as stream:
                stream.write(FORMATS[self.file.suffix.lower()][1] + MARK.encode())
