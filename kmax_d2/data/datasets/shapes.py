"""`shapes`: a small panoptic dataset that is drawn on first use instead of downloaded.

Four textured stuff classes fill each image. Two to five things of five shapes lie on them and overlap one another.
Color says nothing about the class of a thing and little about the class of stuff, so a model has to learn shapes,
textures and instances. Each image is a function of a seed and an index. The files are in COCO panoptic format.
"""

import colorsys
import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator
from PIL import Image
from tqdm import tqdm

from ...files import write_json
from ..panoptic_png import describe, write

VERSION = 3  # Increase it whenever the drawings change, so that an older cache is not used.
SPLITS = {"train": (1000, 0), "val": (100, 1)}  # name: (number of images, seed)
SIZES = ((144, 144), (136, 152), (152, 136), (129, 160), (160, 129))  # (height, width) in pixels

# An instance's id is its category's color plus 8 in red for each earlier instance, so red stays below 216.
CATEGORIES: list[dict[str, Any]] = [
    {"id": 1, "name": "circle", "isthing": 1, "color": [200, 50, 70]},
    {"id": 2, "name": "square", "isthing": 1, "color": [210, 130, 30]},
    {"id": 3, "name": "triangle", "isthing": 1, "color": [150, 70, 190]},
    {"id": 4, "name": "star", "isthing": 1, "color": [205, 195, 40]},
    {"id": 5, "name": "cross", "isthing": 1, "color": [40, 90, 200]},
    {"id": 6, "name": "sky", "isthing": 0, "color": [140, 200, 235]},
    {"id": 7, "name": "grass", "isthing": 0, "color": [80, 150, 60]},
    {"id": 8, "name": "water", "isthing": 0, "color": [30, 120, 130]},
    {"id": 9, "name": "sand", "isthing": 0, "color": [205, 180, 140]},
]
THINGS = [category for category in CATEGORIES if category["isthing"]]
STUFF = [category for category in CATEGORIES if not category["isthing"]]

NUM_THINGS = (2, 5)
RADIUS = (22.0, 38.0)  # pixels from center to corner
MIN_PIXELS = 80  # visible pixels of every segment
MIN_VISIBLE = 0.5  # share of a segment that later things must leave visible
MIN_INSIDE = 0.7  # share of a thing that lies inside the image
MAX_TRIES = 40  # attempts to place things in one image

Shape = tuple[int, ...]  # (height, width)


def draw(seed: int, index: int) -> tuple[np.ndarray, np.ndarray, list[dict]]:
    """Draws image `index` of the endless set that belongs to `seed`.

    Returns:
        image: (H, W, 3) uint8, RGB.
        id_map: (H, W) int32, the segment id of each pixel; no pixel is void.
        segments_info: one dict per segment as in COCO panoptic JSON: id, category_id, iscrowd (always 0), area in
            pixels, bbox [x, y, width, height] in pixels.
    """
    rng = np.random.default_rng([seed, index])
    labels = _stuff_layout(rng, SIZES[rng.integers(len(SIZES))])
    canvas = _paint_stuff(rng, labels)
    categories = list(STUFF)
    for kind, cover in _place_things(rng, labels):
        _paint_thing(rng, canvas, cover)
        categories.append(THINGS[kind])
    # Uneven light, a tint and sensor noise, as in a photograph.
    light = rng.uniform(0.85, 1.1) * (1 + rng.uniform(0, 0.2) * _ramp(rng, labels.shape))
    canvas *= light[..., None] * rng.uniform(0.88, 1.12, 3)
    canvas += rng.uniform(0.008, 0.025) * rng.standard_normal(canvas.shape)

    colors = np.array([category["color"] for category in categories])
    colors[len(STUFF) :, 0] += 8 * np.arange(len(categories) - len(STUFF))
    ids = (colors @ (1, 256, 65536)).astype(np.int32)
    category_ids = {int(id_): category["id"] for id_, category in zip(ids, categories, strict=True)}
    segments_info = [s | {"category_id": category_ids[s["id"]], "iscrowd": 0} for s in describe(ids[labels])]
    return (255 * np.clip(canvas, 0, 1) + 0.5).astype(np.uint8), ids[labels], segments_info


def _noise(rng: Generator, shape: Shape, cell_y: float, cell_x: float) -> np.ndarray:
    """Smooth noise (H, W), about -1 to 1, with features of cell_y by cell_x pixels."""
    coarse = rng.uniform(-1, 1, (int(shape[0] / cell_y) + 2, int(shape[1] / cell_x) + 2))
    return cv2.resize(coarse, None, fx=cell_x, fy=cell_y, interpolation=cv2.INTER_CUBIC)[: shape[0], : shape[1]]


def _ramp(rng: Generator, shape: Shape) -> np.ndarray:
    """A linear ramp (H, W) in a random direction, from about -1 to about 1."""
    y, x = np.linspace(-1, 1, shape[0])[:, None], np.linspace(-1, 1, shape[1])
    angle = rng.uniform(0, 2 * np.pi)
    return (np.cos(angle) * x + np.sin(angle) * y) / (abs(np.cos(angle)) + abs(np.sin(angle)))


def _color(rng: Generator, hue: float, saturation: tuple[float, float], value: tuple[float, float]) -> np.ndarray:
    """A random RGB color (3,) in [0, 1] of a hue in turns."""
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, rng.uniform(*saturation), rng.uniform(*value)))


def _mix(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Blends colors (3,) or images (H, W, 3); `share` (H, W) is the share of the second."""
    return first + (second - first) * share[..., None]


def _texture(rng: Generator, name: str, shape: Shape) -> np.ndarray:
    """Draws the brightness (H, W), about 0 to 1, of a stuff class."""
    if name == "sky":  # soft clouds, nothing finer than eight pixels
        clouds = sum(_noise(rng, shape, 0.6 * cell, cell) * cell / 56 for cell in (32, 16, 8))
        return 0.2 + 0.2 * _ramp(rng, shape) + 0.7 * np.clip(0.4 + 1.2 * clouds, 0, 1)
    if name == "grass":  # two layers of blades, each noise that is stretched upward and sheared
        shears = [np.array([[1, lean, -lean * shape[0] / 2], [0, 1, 0]]) for lean in rng.uniform(-0.5, 0.5, 2)]
        blades = [
            cv2.warpAffine(_noise(rng, shape, 11, 1.7), shear, shape[::-1], borderMode=cv2.BORDER_REFLECT)
            for shear in shears
        ]
        return 0.3 + 0.8 * np.maximum(*blades)
    if name == "water":  # wavy horizontal bands of varying strength
        waves = np.arange(shape[0])[:, None] * (2 * np.pi / rng.uniform(6, 10))
        bend = 2.5 * _noise(rng, shape, 18, 26) + rng.uniform(0, 2 * np.pi)
        return 0.5 + 0.5 * (0.65 + 0.35 * _noise(rng, shape, 6, 24)) * np.sin(waves + bend)
    # Sand: grain of one and two pixels, and a few dark specks.
    grain = 0.35 * rng.uniform(-1, 1, shape) + 0.25 * _noise(rng, shape, 2, 2)
    return 0.6 + grain - 0.6 * (rng.random(shape) > 0.97)


# name: (mean hue in turns, contrast). The hues overlap, so texture has to tell the classes apart.
STUFF_LOOKS = {"sky": (0.58, 0.26), "grass": (0.25, 0.38), "water": (0.52, 0.30), "sand": (0.13, 0.32)}


def _stuff_layout(rng: Generator, shape: Shape) -> np.ndarray:
    """Draws regions of two to four classes as indices into STUFF, (H, W) int64.

    Each pixel belongs to the nearest seed point. Noise on the coordinates roughens the borders, a stretch of the plane
    turns cells into bands, and an occasional extra seed point gives one class two regions.
    """
    y, x = np.mgrid[: shape[0], : shape[1]]
    while True:
        classes = rng.permutation(len(STUFF))[: rng.integers(2, 5)]
        if rng.random() < 0.3:
            classes = np.append(classes, classes[0])
        plane = x + 1j * y
        for cell, reach in ((36, 15), (14, 5), (5, 2)):
            plane += reach * (_noise(rng, shape, cell, cell) + 1j * _noise(rng, shape, cell, cell))
        plane *= np.exp(1j * rng.normal(0, 0.35))
        plane.real *= rng.uniform(0.15, 1)
        seeds = plane[rng.integers(0, shape[0], len(classes)), rng.integers(0, shape[1], len(classes))]
        labels = classes[np.abs(plane - seeds[:, None, None]).argmin(axis=0)]
        if np.bincount(labels.ravel(), minlength=len(STUFF))[classes].min() > 0.12 * labels.size:
            return labels


def _paint_stuff(rng: Generator, labels: np.ndarray) -> np.ndarray:
    """Paints the background, (H, W, 3) in [0, 1]."""
    canvas = np.zeros((*labels.shape, 3))
    for index in np.unique(labels):
        name = STUFF[index]["name"]
        mean_hue, contrast = STUFF_LOOKS[name]
        spread = 0.17 if rng.random() < 0.75 else 0.5
        color = _color(rng, mean_hue + rng.uniform(-spread, spread), (0.1, 0.6), (0.45, 0.75))
        contrast *= rng.uniform(0.8, 1.2)
        paint = _mix(color * (1 - contrast), color * (1 + contrast), np.clip(_texture(rng, name, labels.shape), 0, 1))
        region = cv2.GaussianBlur((labels == index).astype(np.float64), (3, 3), 0)  # borders are not jagged
        canvas += paint * region[..., None]
    return canvas


def _ring(*radii: float) -> np.ndarray:
    """Corners at equal angles and the given distances from the center, as complex numbers x + iy."""
    return np.exp(2j * np.pi * np.arange(len(radii)) / len(radii)) * radii


_HALF_CROSS = np.array([1 + 0.3j, 0.3 + 0.3j, 0.3 + 1j, -0.3 + 1j, -0.3 + 0.3j, -1 + 0.3j])
# name: corners of a shape that fits the unit circle
OUTLINES = {
    "circle": _ring(*[0.9] * 28),
    "square": _ring(1, 1, 1, 1),
    "triangle": _ring(1, 1, 1),
    "star": _ring(*[1, 0.45] * 5),
    "cross": np.concatenate([_HALF_CROSS, -_HALF_CROSS]) / np.hypot(1, 0.3),
}


def _random_thing(rng: Generator, shape: Shape) -> tuple[int, np.ndarray]:
    """Draws the index in THINGS and the corners (V, 2) of a thing, as (x, y) in pixels, float32."""
    kind = int(rng.integers(len(THINGS)))
    outline, aspect = OUTLINES[THINGS[kind]["name"]], rng.uniform(0.85, 1.15)
    turned = (outline.real * aspect + 1j * outline.imag / aspect) * np.exp(2j * np.pi * rng.random())
    corners = np.stack([turned.real, turned.imag], axis=1) * rng.uniform(*RADIUS) + rng.uniform(0, 1, 2) * shape[::-1]
    return kind, corners.astype(np.float32)


def _place_things(rng: Generator, labels: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Adds things to `labels` (H, W) in place, each over the earlier ones, labeled from len(STUFF) upward.

    A thing that would lie too far outside, or hide too much of what is already there, is drawn again. Returns the index
    in THINGS and the antialiased coverage, (H, W) uint8, of each thing.
    """
    whole = np.bincount(labels.ravel(), minlength=len(STUFF)).astype(np.float64)
    things: list[tuple[int, np.ndarray]] = []
    wanted = rng.integers(*NUM_THINGS, endpoint=True)
    for _ in range(MAX_TRIES):
        if len(things) == wanted:
            break
        kind, corners = _random_thing(rng, labels.shape)
        sixteenths = np.rint(corners * 16).astype(np.int32)
        cover = cv2.fillPoly(np.zeros(labels.shape, np.uint8), [sixteenths], (255,), cv2.LINE_AA, shift=4)
        after = np.where(cover > 127, len(whole), labels)
        visible = np.bincount(after.ravel(), minlength=len(whole) + 1)
        area = cv2.contourArea(corners)
        others_show = (visible[:-1] >= np.maximum(MIN_PIXELS, MIN_VISIBLE * whole)) | (whole == 0)
        if visible[-1] >= max(MIN_PIXELS, MIN_INSIDE * area) and others_show.all():
            labels[:] = after
            whole = np.append(whole, area)
            things.append((kind, cover))
    return things


def _paint_thing(rng: Generator, canvas: np.ndarray, cover: np.ndarray) -> None:
    """Paints a thing of coverage (H, W), uint8, and its shadow over an image (H, W, 3) in place."""
    x, y, width, height = cv2.boundingRect(cover)
    window = np.s_[max(y - 6, 0) : y + height + 6, max(x - 6, 0) : x + width + 6]
    cover, below = cover[window], canvas[window]

    y, x = np.mgrid[: cover.shape[0], : cover.shape[1]]
    plane = (x + 1j * y) * np.exp(1j * rng.uniform(0, np.pi)) * rng.uniform(0.45, 0.8)
    u, v = np.sin(plane.real), np.sin(plane.imag)
    plain, stripes, checks, dots = np.full(u.shape, -1.0), u, u * v, np.abs(u * v) - 0.5
    pattern = np.clip(0.5 + 2 * (plain, stripes, checks, dots)[rng.integers(4)], 0, 1)
    first, second = (_color(rng, rng.random(), (0.15, 0.9), (0.35, 1)) for _ in range(2))

    inside, outside = (cv2.distanceTransform(side, cv2.DIST_L2, 5) for side in (cover & 128, ~cover & 128))
    rim = 0.7 + 0.3 * np.clip(inside / 3, 0, 1)  # keeps two things of the same color apart
    light = rim * (1 + 0.25 * _ramp(rng, cover.shape))
    shadow = 0.35 * np.exp(-outside / 2.5)
    paint = _mix(first, second, 0.8 * pattern) * light[..., None]
    below[:] = _mix(below * (1 - shadow)[..., None], paint, cover / 255)


def write_split(root: Path, split: str, num_images: int, seed: int) -> None:
    """Writes `root/<split>/NNNN.jpg`, `root/panoptic_<split>/NNNN.png`, and last `root/panoptic_<split>.json`."""
    (root / f"panoptic_{split}.json").unlink(missing_ok=True)
    (root / split).mkdir(parents=True, exist_ok=True)
    (root / f"panoptic_{split}").mkdir(exist_ok=True)
    images: list[dict] = []
    annotations: list[dict] = []
    for index in tqdm(range(num_images), desc=f"drawing shapes/{split}", unit="image", mininterval=0.5):
        image, id_map, segments_info = draw(seed, index)
        height, width = id_map.shape
        images.append({"id": index, "file_name": f"{index:04d}.jpg", "height": height, "width": width})
        annotations.append({"image_id": index, "file_name": f"{index:04d}.png", "segments_info": segments_info})
        Image.fromarray(image).save(root / split / images[-1]["file_name"], quality=95)
        write(root / f"panoptic_{split}" / annotations[-1]["file_name"], id_map, annotations[-1])
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    write_json(root / f"panoptic_{split}.json", content)


def folder(root: Path | None = None) -> Path:
    """Returns the dataset's folder `<root>/shapes-v<VERSION>`; the root is $KMAX_D2_CACHE or ~/.cache/kmax_d2."""
    root = Path(root or os.environ.get("KMAX_D2_CACHE") or "~/.cache/kmax_d2").expanduser()
    return root / f"shapes-v{VERSION}"


def prepare(root: Path | None = None) -> Path:
    """Draws the splits if files are missing, and returns their folder, that of :func:`folder`."""
    target = folder(root)
    if _is_complete(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # Processes that run at the same time each draw into a folder of their own. The first to rename it wins.
    with tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as own:
        for split, (num_images, seed) in SPLITS.items():
            write_split(Path(own, "new"), split, num_images, seed)
        try:
            if not _is_complete(target):
                with contextlib.suppress(FileNotFoundError):
                    os.rename(target, Path(own, "broken"))
                os.rename(Path(own, "new"), target)
        except OSError:
            if not _is_complete(target):
                raise
    return target


def _is_complete(folder: Path) -> bool:
    """Whether every split has its JSON file and all of its images."""
    for split, (count, _) in SPLITS.items():
        found = [len(list(folder.glob(files))) for files in (f"{split}/*", f"panoptic_{split}/*")]
        if min(found) < count or not (folder / f"panoptic_{split}.json").is_file():
            return False
    return True
