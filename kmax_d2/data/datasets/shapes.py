"""`shapes`: a small panoptic dataset that is drawn, not downloaded.

Four textured stuff classes fill the image, and two to five things of five outlines lie on them and over one another.
Colour says nothing of a thing's class and little of a stuff class: a model has to learn outlines, textures and
instances. An image follows from a seed and an index alone. Written in COCO's panoptic format.
"""

import colorsys
import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

# One more whenever the drawing changes, so that an older cache is not taken for this one.
VERSION = 2
# name: (number of images, seed)
SPLITS = {"train": (480, 0), "val": (100, 1)}
# (height, width) in pixels, none below the 129-pixel crop of the quickstart
SIZES = ((144, 144), (136, 152), (152, 136), (129, 160), (160, 129))

# Red stays below 216: an instance's id is its category's colour, a little redder for each further instance.
CATEGORIES = [
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
RADIUS = (22.0, 38.0)  # pixels, centre to corner
MIN_PIXELS = 80  # that every segment shows
MIN_VISIBLE = 0.5  # of a segment's whole area, once others lie over it
MIN_INSIDE = 0.7  # of a thing's whole area, inside the image
MAX_TRIES = 40  # at placing a thing, in one image


def draw(seed: int, index: int) -> tuple[np.ndarray, np.ndarray, list[dict]]:
    """Draw image `index` of the endless set that `seed` names.

    Returns:
        image: (H, W, 3) uint8, RGB.
        id_map: (H, W) int32, the segment id of each pixel. No pixel is without one.
        segments_info: one dict per segment, as in COCO's panoptic JSON: id, category_id, iscrowd (always 0),
            area in pixels, bbox [x, y, w, h] in pixels.
    """
    rng = np.random.default_rng([seed, index])
    height, width = SIZES[rng.integers(len(SIZES))]
    labels = _stuff_layout(rng, height, width)
    canvas = _paint_stuff(rng, labels)
    categories = list(STUFF)
    for kind, window, distance in _place_things(rng, labels):
        _paint_thing(rng, canvas[window], distance)
        categories.append(THINGS[kind])
    image = _photograph(rng, canvas)
    return image, *_describe(labels, categories)


def _noise(rng: np.random.Generator, height: int, width: int, cell_y: float, cell_x: float) -> np.ndarray:
    """Value noise in [-1, 1], (H, W), with features of cell_y × cell_x pixels."""
    field = rng.uniform(-1, 1, (int(height / cell_y) + 2, int(width / cell_x) + 2))
    for axis, (size, cell) in enumerate(((height, cell_y), (width, cell_x))):
        place = np.arange(size) / cell
        cell_index = place.astype(np.int64)
        blend = _smoothstep(place - cell_index)
        blend = blend[:, None] if axis == 0 else blend
        low, high = (field.take(cell_index + step, axis=axis) for step in (0, 1))
        field = low + (high - low) * blend
    return field


def _smoothstep(x: np.ndarray) -> np.ndarray:
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def _slope(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A linear ramp in a random direction, (H, W), from about -1 to about 1."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)
    return (np.cos(angle) * x + np.sin(angle) * y) / (abs(np.cos(angle)) + abs(np.sin(angle)))


def _hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    """One colour, (3,), RGB in [0, 1]. The hue is in turns and may lie outside [0, 1]."""
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, value))


def _mix(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Blend two colours (3,) or images (H, W, 3) by the second one's share (H, W)."""
    return first + (second - first) * share[..., None]


def _sky(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Soft clouds, nothing finer than eight pixels."""
    clouds = sum(_noise(rng, height, width, cell * 0.6, cell) * cell / 56 for cell in (32, 16, 8))
    return 0.2 + 0.2 * _slope(rng, height, width) + 0.7 * _smoothstep(0.4 + clouds)


def _grass(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Blades: noise stretched upwards, two layers that lean differently."""
    rows, columns = np.arange(height)[:, None], np.arange(width)
    blades = []
    for lean in rng.uniform(-0.5, 0.5, 2):
        upright = _noise(rng, height, width + height, 11, 1.7)
        shift = (lean * rows + (height if lean < 0 else 0)).astype(np.int64)
        blades.append(upright[rows, (columns + shift) % (width + height)])
    return 0.5 + 0.7 * np.maximum(*blades) - 0.2


def _water(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Wavy bands along the rows, broken where a slow noise lowers them."""
    waves = np.arange(height)[:, None] * (2 * np.pi / rng.uniform(6, 10))
    bend = 2.5 * _noise(rng, height, width, 18, 26)
    strength = 0.65 + 0.35 * _noise(rng, height, width, 6, 24)
    return 0.5 + 0.5 * strength * np.sin(waves + bend + rng.uniform(0, 2 * np.pi))


def _sand(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Grain of one and two pixels, and a few dark specks."""
    grain = 0.35 * rng.uniform(-1, 1, (height, width)) + 0.25 * _noise(rng, height, width, 2, 2)
    return 0.6 + grain - 0.6 * (rng.random((height, width)) > 0.97)


# name: (texture, mean hue in turns, contrast). The hues overlap, so the texture has to tell.
STUFF_LOOKS: dict[str, tuple[Callable, float, float]] = {
    "sky": (_sky, 0.58, 0.26),
    "grass": (_grass, 0.25, 0.38),
    "water": (_water, 0.52, 0.30),
    "sand": (_sand, 0.13, 0.32),
}


def _stuff_layout(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Regions of two to four classes as indices into STUFF, (H, W) int64.

    Each pixel goes to the nearest seed. A noise on the coordinates roughens the borders, a stretch of the plane turns
    some cells into bands, and one seed more than there are classes lets a class show up twice.
    """
    y, x = np.mgrid[:height, :width].astype(np.float64)
    while True:
        num_classes = rng.integers(2, 5)
        classes = rng.permutation(len(STUFF))[:num_classes]
        if rng.random() < 0.3:
            classes = np.append(classes, classes[0])
        rough_y, rough_x = (
            sum(reach * _noise(rng, height, width, cell, cell) for cell, reach in ((36, 15), (14, 5), (5, 2)))
            for _ in range(2)
        )
        angle, stretch = rng.normal(0, 0.35), rng.uniform(0.15, 1)
        along = stretch * (np.cos(angle) * (x + rough_x) - np.sin(angle) * (y + rough_y))
        across = np.sin(angle) * (x + rough_x) + np.cos(angle) * (y + rough_y)
        seed_pixels = (rng.integers(0, height, len(classes)), rng.integers(0, width, len(classes)))
        far = [(along - along[seed]) ** 2 + (across - across[seed]) ** 2 for seed in zip(*seed_pixels, strict=True)]
        labels = classes[np.argmin(far, axis=0)]
        areas = np.bincount(labels.ravel(), minlength=len(STUFF))[classes]
        if areas.min() > 0.12 * height * width:
            return labels


def _paint_stuff(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """The background, (H, W, 3) in [0, 1]."""
    height, width = labels.shape
    canvas = np.zeros((height, width, 3))
    for index in np.unique(labels):
        texture, mean_hue, contrast = STUFF_LOOKS[STUFF[index]["name"]]
        hue = mean_hue + (rng.uniform(-0.17, 0.17) if rng.random() < 0.75 else rng.uniform(-0.5, 0.5))
        colour = _hsv(hue, rng.uniform(0.1, 0.6), rng.uniform(0.45, 0.75))
        contrast *= rng.uniform(0.8, 1.2)
        paint = _mix(colour * (1 - contrast), colour * (1 + contrast), np.clip(texture(rng, height, width), 0, 1))
        canvas += paint * _soften(labels == index)[..., None]
    return canvas


def _soften(mask: np.ndarray) -> np.ndarray:
    """Blur a mask (H, W) by one pixel, so that the borders between regions are not jagged."""
    soft = np.pad(mask.astype(np.float64), 1, mode="edge")
    soft = (soft[:-2] + 2 * soft[1:-1] + soft[2:]) / 4
    return (soft[:, :-2] + 2 * soft[:, 1:-1] + soft[:, 2:]) / 4


def _ring(radii: list[float]) -> np.ndarray:
    """Corners (V, 2) at equal angles and the given distances from the centre."""
    angles = np.arange(len(radii)) * (2 * np.pi / len(radii))
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.array(radii)[:, None]


def _cross(arm: float) -> np.ndarray:
    corner = np.array([[arm, arm], [arm, 1], [-arm, 1]])
    quarter_turn = np.array([[0, 1], [-1, 0]])
    return np.concatenate([corner @ np.linalg.matrix_power(quarter_turn, turns) for turns in range(4)])


# name: corners (V, 2) of an outline that fits the unit circle
OUTLINES = {
    "circle": _ring([0.9] * 28),
    "square": np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * 0.5**0.5,
    "triangle": _ring([1.0] * 3),
    "star": _ring([1.0, 0.45] * 5),
    "cross": _cross(0.3) / np.hypot(0.3, 1),
}


def _signed_distance(corners: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance in pixels of the points (x, y), (H, W) each, to a polygon with corners (V, 2); negative inside it."""
    nearest = np.full(x.shape, np.inf)
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        edge_x, edge_y = bx - ax, by - ay
        from_x, from_y = x - ax, y - ay
        along = np.clip((from_x * edge_x + from_y * edge_y) / (edge_x**2 + edge_y**2), 0, 1)
        nearest = np.minimum(nearest, (from_x - along * edge_x) ** 2 + (from_y - along * edge_y) ** 2)
        # An edge that a ray to the right crosses changes sides.
        inside ^= ((y < ay) != (y < by)) & ((from_x * edge_y < from_y * edge_x) == (edge_y > 0))
    return np.where(inside, -1, 1) * np.sqrt(nearest)


def _random_outline(rng: np.random.Generator, height: int, width: int) -> tuple[int, np.ndarray]:
    """A thing's index in THINGS, and the corners (V, 2) of its outline as (x, y) in pixels."""
    kind = int(rng.integers(len(THINGS)))
    radius, aspect, angle = rng.uniform(*RADIUS), rng.uniform(0.85, 1.15), rng.uniform(0, 2 * np.pi)
    stretch = np.array([aspect, 1 / aspect])
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    centre = rng.uniform(0, 1, 2) * (width, height)
    return kind, OUTLINES[THINGS[kind]["name"]] * stretch @ turn * radius + centre


def _window(corners: np.ndarray, height: int, width: int, margin: int = 6) -> tuple[slice, slice]:
    """The part of the image that an outline and the shadow around it touch."""
    left, top = np.maximum(np.floor(corners.min(axis=0)).astype(int) - margin, 0)
    right, bottom = np.minimum(np.ceil(corners.max(axis=0)).astype(int) + margin, (width, height))
    return slice(top, bottom), slice(left, right)


def _area(corners: np.ndarray) -> float:
    """Of a polygon (V, 2), in pixels."""
    following = np.roll(corners, -1, axis=0)
    return abs(np.sum(corners[:, 0] * following[:, 1] - corners[:, 1] * following[:, 0])) / 2


def _place_things(rng: np.random.Generator, labels: np.ndarray) -> list[tuple[int, tuple[slice, slice], np.ndarray]]:
    """Put things into `labels` (H, W), in place, each over those before it, with len(STUFF) + its number as its label.

    A thing that would lie too far outside, or hide too much of what is there already, is drawn anew.

    Returns:
        for each thing its index in THINGS, the window of the image it touches, and its signed distance (h, w) there.
    """
    rows, columns = np.mgrid[: labels.shape[0], : labels.shape[1]] + 0.5  # pixel centres
    whole = np.bincount(labels.ravel(), minlength=len(STUFF)).astype(np.float64)
    things: list[tuple[int, tuple[slice, slice], np.ndarray]] = []
    wanted = rng.integers(NUM_THINGS[0], NUM_THINGS[1] + 1)
    for _ in range(MAX_TRIES):
        if len(things) == wanted:
            break
        kind, corners = _random_outline(rng, *labels.shape)
        window, area = _window(corners, *labels.shape), _area(corners)
        distance = _signed_distance(corners, columns[window], rows[window])
        after = labels.copy()
        after[window][distance < 0] = len(whole)
        visible = np.bincount(after.ravel(), minlength=len(whole) + 1)
        others_show = (visible[:-1] >= np.maximum(MIN_PIXELS, MIN_VISIBLE * whole)) | (whole == 0)
        if visible[-1] >= max(MIN_PIXELS, MIN_INSIDE * area) and others_show.all():
            labels[:] = after
            whole = np.append(whole, area)
            things.append((kind, window, distance))
    return things


def _pattern(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Plain, stripes, checks or dots at a random scale and angle, (H, W) in [0, 1]."""
    kind = rng.integers(4)
    angle, wave = rng.uniform(0, np.pi), rng.uniform(0.45, 0.8)
    y, x = np.mgrid[:height, :width]
    u = np.sin(wave * (np.cos(angle) * x - np.sin(angle) * y))
    v = np.sin(wave * (np.sin(angle) * x + np.cos(angle) * y))
    field = (np.full(u.shape, -1.0), u, u * v, np.abs(u * v) - 0.5)[kind]
    return np.clip(0.5 + 2 * field, 0, 1)


def _paint_thing(rng: np.random.Generator, canvas: np.ndarray, distance: np.ndarray) -> None:
    """Paint a thing and its shadow into `canvas` (h, w, 3), in place, by its signed distance (h, w) in pixels."""
    first = _hsv(rng.random(), rng.uniform(0.15, 0.9), rng.uniform(0.35, 1))
    second = _hsv(rng.random(), rng.uniform(0.15, 0.9), rng.uniform(0.35, 1))
    paint = _mix(first, second, 0.8 * _pattern(rng, *distance.shape))
    light = 1 + 0.25 * _slope(rng, *distance.shape)
    rim = 0.7 + 0.3 * _smoothstep(-distance / 3)  # keeps two things of one colour apart
    shadow = 0.35 * np.exp(-np.maximum(distance, 0) / 2.5)
    cover = np.clip(0.5 - distance, 0, 1)
    canvas[:] = _mix(canvas * (1 - shadow)[..., None], paint * (light * rim)[..., None], cover)


def _photograph(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """Uneven light, a tint and the sensor's noise: (H, W, 3) in [0, 1] -> uint8."""
    light = rng.uniform(0.85, 1.1) * (1 + rng.uniform(0, 0.2) * _slope(rng, *canvas.shape[:2]))
    image = canvas * light[..., None] * rng.uniform(0.88, 1.12, 3)
    image += rng.uniform(0.008, 0.025) * rng.standard_normal(canvas.shape)
    return (255 * np.clip(image, 0, 1) + 0.5).astype(np.uint8)


def _describe(labels: np.ndarray, categories: list[dict]) -> tuple[np.ndarray, list[dict]]:
    """Labels (H, W), indices into `categories`, as an id map (H, W) int32 and its segments_info."""
    ids = np.zeros(len(categories), dtype=np.int32)
    segments_info = []
    for label in np.unique(labels):
        red, green, blue = categories[label]["color"]
        instance = max(0, int(label) - len(STUFF))
        ids[label] = red + 8 * instance + 256 * green + 65536 * blue
        mask = labels == label
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        x, y = int(columns[0]), int(rows[0])
        segment = {"id": int(ids[label]), "category_id": categories[label]["id"], "iscrowd": 0}
        segment |= {"area": int(mask.sum()), "bbox": [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1]}
        segments_info.append(segment)
    return ids[labels], segments_info


def write_split(root: Path, split: str, num_images: int, seed: int) -> None:
    """Write `num_images` images in COCO's panoptic format.

    `root/<split>/NNNN.jpg`, `root/panoptic_<split>/NNNN.png` with id = R + 256 G + 65536 B, and
    `root/panoptic_<split>.json`, which is written last: where it is, the split is whole.
    """
    root = Path(root)
    json_file = root / f"panoptic_{split}.json"
    json_file.unlink(missing_ok=True)
    for folder in (split, f"panoptic_{split}"):
        (root / folder).mkdir(parents=True, exist_ok=True)

    images, annotations = [], []
    for index in tqdm(range(num_images), desc=f"drawing shapes/{split}", unit="image", mininterval=0.5):
        image, id_map, segments_info = draw(seed, index)
        height, width = id_map.shape
        name = f"{index:04d}"
        Image.fromarray(image).save(root / split / f"{name}.jpg", quality=95)
        id_colours = np.stack([id_map, id_map >> 8, id_map >> 16], axis=-1).astype(np.uint8)
        Image.fromarray(id_colours).save(root / f"panoptic_{split}" / f"{name}.png")
        images.append({"id": index, "file_name": f"{name}.jpg", "height": height, "width": width})
        annotations.append({"image_id": index, "file_name": f"{name}.png", "segments_info": segments_info})

    info = {"description": f"kmax_d2 shapes, {split}", "version": str(VERSION)}
    content = {"info": info, "images": images, "annotations": annotations, "categories": CATEGORIES}
    unfinished = json_file.with_suffix(".json.part")
    unfinished.write_text(json.dumps(content))
    os.replace(unfinished, json_file)


def folder(root: Path | None = None) -> Path:
    """Where the dataset lies: `<root>/shapes-v<VERSION>`, the root being $KMAX_D2_CACHE or else ~/.cache/kmax_d2."""
    root = Path(root or os.environ.get("KMAX_D2_CACHE") or "~/.cache/kmax_d2").expanduser()
    return root / f"shapes-v{VERSION}"


def prepare(root: Path | None = None) -> Path:
    """Draw the splits once and return their folder, that of :func:`folder`."""
    target = folder(root)
    if _is_whole(target):
        return target
    # Drawn under a name of its own and renamed once whole, so that processes side by side do not meet.
    own = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    try:
        for split, (num_images, seed) in SPLITS.items():
            write_split(own / "new", split, num_images, seed)
        if not _is_whole(target):
            with contextlib.suppress(FileNotFoundError):
                os.rename(target, own / "broken")
            os.rename(own / "new", target)
    except OSError:
        # Another process may have put its own there between the look and the rename: then that one is used.
        if not _is_whole(target):
            raise
    finally:
        shutil.rmtree(own, ignore_errors=True)
    return target


def _is_whole(folder: Path) -> bool:
    """Whether every split has its JSON file, which is written last, and has lost no image since."""
    for split, (num_images, _) in SPLITS.items():
        if not (folder / f"panoptic_{split}.json").is_file():
            return False
        for files in (folder / split, folder / f"panoptic_{split}"):
            if not files.is_dir() or len(os.listdir(files)) < num_images:
                return False
    return True
