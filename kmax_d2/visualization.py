"""Pictures: panoptic overlays, and the cluster that each pixel is assigned to (as in Figure 4 of the paper)."""

import colorsys
import functools
from collections import Counter
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
import torch
from detectron2.data import Metadata
from detectron2.evaluation import inference_context
from detectron2.structures import Instances
from detectron2.utils.visualizer import VisImage, Visualizer
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from .data.datasets.coco_panoptic import things_of
from .data.mapper import PanopticTestMapper, read_image, read_segments
from .evaluation.semantic import class_map

SHORT_SIDE = 384  # smaller pictures are enlarged to at least this many pixels, so that labels are readable
LONG_SIDE = 4096  # but not beyond this
PANEL_SIDE = 512  # pixels of the long side to which the panels of a result page are limited
LEAST_SCORE = 0.5  # of the instances that are drawn


class _SteadyVisualizer(Visualizer):
    """Detectron2's visualizer with readable labels, and with the same shades of instances in every run."""

    def __init__(self, image: np.ndarray, metadata: Metadata, long_side: int | None = None):
        super().__init__(enlarged(image, long_side), metadata)
        self._seen: Counter = Counter()

    def _jitter(self, color: Sequence[float]) -> tuple[float, float, float]:
        """Keeps the color for the first instance, then alternates between darker and lighter, slightly turned ones."""
        number = self._seen[tuple(color)]
        self._seen[tuple(color)] += 1
        hue, lightness, saturation = colorsys.rgb_to_hls(*color)
        step = (number + 1) // 2 * (-1 if number % 2 else 1)
        lightness = 0.25 + (lightness - 0.25 + 0.17 * step) % 0.55 if step else lightness
        return colorsys.hls_to_rgb((hue + 0.03 * step) % 1, lightness, saturation)

    def _draw_text_in_mask(self, binary_mask: np.ndarray, text: str, color: Sequence[float]) -> None:
        """Writes at the point of a mask (H, W) farthest from its border: the median pixel may lie outside."""
        depth = cv2.distanceTransform(np.pad(binary_mask.astype(np.uint8), 1), cv2.DIST_L2, 3)
        y, x = np.unravel_index(np.argmax(depth), depth.shape)
        self.draw_text(text, (float(x), float(y)), color=color)

    def draw_text(self, text: str, position: Sequence[float], **options) -> VisImage:
        """Writes, and moves labels that would leave the image back into it."""
        output = super().draw_text(text, position, **options)
        label = output.ax.texts[-1]
        box = label.get_window_extent(output.canvas.get_renderer()).padded(2)
        x = position[0] - min(0, box.x0) + min(0, output.width - box.x1)
        y = position[1] - min(0, output.height - box.y1) + min(0, box.y0)
        label.set_position((x, y))
        return output


def _enlarge(picture: np.ndarray, interpolation: int, long_side: int | None) -> np.ndarray:
    """Scales a picture (H, W, ...) by the integer factor at which labels are readable, or down to `long_side`."""
    height, width = picture.shape[:2]
    limit = long_side or LONG_SIDE
    factor: float = max(1, min(-(-SHORT_SIDE // min(height, width)), limit // max(height, width)))
    if long_side and max(height, width) > long_side:
        factor = long_side / max(height, width)
        interpolation = cv2.INTER_AREA if interpolation == cv2.INTER_CUBIC else interpolation
    size = max(1, round(factor * width)), max(1, round(factor * height))
    return cv2.resize(picture, size, interpolation=interpolation)


def enlarged(image: np.ndarray, long_side: int | None = None) -> np.ndarray:
    """Returns an image (H, W, 3) at the size that :func:`draw_panoptic` gives it."""
    return _enlarge(image, cv2.INTER_CUBIC, long_side)


def draw_panoptic(
    image: np.ndarray,
    segment_ids: torch.Tensor | np.ndarray,
    segments: list[dict],
    metadata: Metadata,
    long_side: int | None = None,
) -> np.ndarray:
    """Draws a segmentation and its labels over an image.

    Args:
        image: (H, W, 3) uint8, RGB.
        segment_ids: (H, W), 0 for void.
        segments: for each segment a dict with "id", "category_id" (contiguous), "isthing", and optionally "score".
        metadata: the dataset's, with class names and colors.
        long_side: pixels of the picture's long side, to which a larger image is shrunk; None shrinks none.

    Returns:
        (f H, f W, 3) uint8, RGB; the integer f is 1 except for small images.
    """
    ids = _enlarge(torch.as_tensor(segment_ids).cpu().numpy().astype(np.int32), cv2.INTER_NEAREST, long_side)
    copies = [dict(segment) for segment in segments]  # Detectron2 changes them
    visualizer = _SteadyVisualizer(image, metadata, long_side)
    return visualizer.draw_panoptic_seg(torch.from_numpy(ids), copies, alpha=0.6).get_image()


def draw_semantic(
    image: np.ndarray, classes: np.ndarray, metadata: Metadata, long_side: int | None = None
) -> np.ndarray:
    """Draws a class map (H, W) as :func:`draw_panoptic` draws segments."""
    classes = _enlarge(classes, cv2.INTER_NEAREST, long_side)
    return _SteadyVisualizer(image, metadata, long_side).draw_sem_seg(classes, alpha=0.6).get_image()


def draw_instances(
    image: np.ndarray, instances: Instances, metadata: Metadata, long_side: int | None = None
) -> np.ndarray:
    """Draws instances with a score of at least LEAST_SCORE as :func:`draw_panoptic` draws segments."""
    kept = instances[instances.scores >= LEAST_SCORE]
    masks = [_enlarge(mask.astype(np.uint8), cv2.INTER_NEAREST, long_side) for mask in kept.pred_masks.numpy()]
    labels = [
        f"{metadata.thing_classes[index]} {score:.0%}"
        for index, score in zip(kept.pred_classes, kept.scores, strict=True)
    ]
    visualizer = _SteadyVisualizer(image, metadata, long_side)
    colors = [visualizer._jitter(np.divide(metadata.thing_colors[index], 255)) for index in kept.pred_classes]
    return visualizer.overlay_instances(masks=masks, labels=labels, assigned_colors=colors, alpha=0.6).get_image()


@functools.cache
def cluster_palette(num_clusters: int) -> np.ndarray:
    """Returns colors (N, 3), uint8, RGB, each as far as possible from those before it (in CIELAB)."""
    candidates = 15 * np.indices((18, 18, 18), dtype=np.uint8).reshape(3, -1).T
    lab = cv2.cvtColor(candidates[None].astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[0]
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    vivid = (lab[:, 0] > 45) & (lab[:, 0] < 93) & (chroma > 25)
    candidates, lab = candidates[vivid], lab[vivid]
    chosen, distance = [int(np.argmax(chroma[vivid]))], np.full(len(lab), np.inf)
    while len(chosen) < num_clusters:
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
        chosen.append(int(np.argmax(distance)))
    return candidates[chosen]


def draw_assignment(image: np.ndarray, assignment: np.ndarray) -> np.ndarray:
    """Colors every pixel by its cluster, with the cluster's color of :func:`cluster_palette`, over a faint image.

    Takes and returns (H, W, 3) uint8, RGB; of the assignment's (h, w) positions, the outermost lie on the image border.
    """
    rows, columns = (
        np.rint(np.linspace(0, positions - 1, pixels)).astype(np.int64)
        for positions, pixels in zip(assignment.shape, image.shape[:2], strict=True)
    )
    colors = cluster_palette(int(assignment.max()) + 1)[assignment[rows[:, None], columns]]
    gray = image.mean(axis=2, keepdims=True)
    return np.rint(0.75 * colors + 0.25 * gray).astype(np.uint8)


def assignments(model: nn.Module, image: torch.Tensor) -> list[np.ndarray]:
    """Returns the nearest cluster center of each position, for each decoder in turn and then the final predictor.

    Takes an image (3, H, W), RGB, 0 to 255, and returns maps (h, w) of cluster indices, each at its own stride.
    """
    result = model.predict(image[None], auxiliary=True)  # type: ignore[operator]
    predictions = [*result["auxiliary"], result]
    return [prediction["mask_logits"][0].argmax(0).cpu().numpy() for prediction in predictions]


def page(panels: Sequence[tuple[str, np.ndarray]], columns: int = 3) -> np.ndarray:
    """Arranges titled pictures (H, W, 3), uint8, RGB, row by row on a white page, all at one size; returns the same."""
    height, width = np.max([image.shape[:2] for _, image in panels], axis=0).tolist()
    gap = text_size = max(14, round(0.045 * min(height, width)))
    line, columns, rows = round(1.7 * text_size), min(columns, len(panels)), -(-len(panels) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + line + gap) + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(text_size)
    for number, (title, image) in enumerate(panels):
        x, y = gap + number % columns * (width + gap), gap + number // columns * (height + line + gap)
        draw.text((x, y), title, fill="black", font=font)
        scale = min(width / image.shape[1], height / image.shape[0])
        size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
        sheet.paste(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS), (x, y + line))
    return np.asarray(sheet)


@torch.no_grad()
def result_page(model: nn.Module, record: dict, metadata: Metadata) -> np.ndarray:
    """Draws one image: the input, its ground truth if there is any, the prediction, and the clusters of each decoder.

    Takes a record of the dataset, of which "file_name" is enough, or of the test mapper. A model without `predict` has
    no clusters. Returns a :func:`page` of panels of at most PANEL_SIDE pixels.
    """
    if "image" not in record:
        record = PanopticTestMapper(size=getattr(model, "test_size", None))(record)
    with inference_context(model):
        output = model([record])[0]
    image = read_image(record)
    panels = [("input", enlarged(image, PANEL_SIDE))]
    if "pan_seg_file_name" in record and "segments_info" in record:
        things = things_of(metadata)
        true_ids, classes = read_segments(record, things)
        truth = [{"id": i, "category_id": c, "isthing": c in things} for i, c in enumerate(classes, start=1)]
        panels.append(("ground truth", draw_panoptic(image, true_ids, truth, metadata, PANEL_SIDE)))
    panels.append(("prediction", _draw_output(image, output, metadata)))
    if hasattr(model, "predict"):
        clusters, size = assignments(model, record["image"]), record["image"].shape[-2:]
        *decoders, final = cluster_panels(image, clusters, size, PANEL_SIDE)
        panels += decoders if len(panels) == 3 else [final, *decoders]
    return page(panels)


def _draw_output(image: np.ndarray, output: Mapping, metadata: Metadata) -> np.ndarray:
    """Draws the first of an output's panoptic, semantic, and instance results that is on, as a panel."""
    if "panoptic_seg" in output:
        segment_ids, segments = output["panoptic_seg"]
        return draw_panoptic(image, segment_ids, segments, metadata, PANEL_SIDE)
    if "semantic" in output or "sem_seg" in output:
        return draw_semantic(image, class_map(output).cpu().numpy(), metadata, PANEL_SIDE)
    return draw_instances(image, output["instances"].to("cpu"), metadata, PANEL_SIDE)


def cluster_panels(
    image: np.ndarray, clusters: Sequence[np.ndarray], size: Sequence[int], long_side: int | None = None
) -> list[tuple[str, np.ndarray]]:
    """Draws the clusters of each decoder and the final ones over an image: titles and pictures for a :func:`page`.

    Args:
        image: (H, W, 3), uint8, RGB.
        clusters: maps (h, w) of cluster indices, the final one last.
        size: (height, width) of the model's input, of which the maps are.
        long_side: as for :func:`draw_panoptic`.
    """
    image = enlarged(image, long_side)
    titles = [*(f"decoder {number}" for number in range(1, len(clusters))), "final clusters"]
    return [
        (f"{title} (stride {_stride(size, clusters_at.shape)})", draw_assignment(image, clusters_at))
        for title, clusters_at in zip(titles, clusters, strict=True)
    ]


def _stride(size: Sequence[int], map_size: Sequence[int]) -> int:
    """Returns the power of two between positions of a map (h, w) that starts at the first pixel of an image (H, W)."""
    pixels, positions = max(zip(size, map_size, strict=True))
    return 1 << (max(1, (pixels - 1) // max(1, positions - 1)).bit_length() - 1)
