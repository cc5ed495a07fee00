"""Pictures: panoptic overlays, and which cluster each pixel is assigned to (the paper's Figure 4)."""

from __future__ import annotations

import colorsys
import functools
from collections import Counter
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from detectron2.utils.visualizer import Visualizer
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from .data.mapper import PanopticTestMapper, read_image, read_segments

SHORT_SIDE = 384  # pixels that a picture has at least, so that its labels can be read
LONG_SIDE = 4096  # pixels that a picture is not enlarged beyond


class _SteadyVisualizer(Visualizer):
    """Detectron2's visualizer, but instances have the same shades in every run, and labels can be read."""

    def __init__(self, image: np.ndarray, metadata):
        super().__init__(image, metadata)
        self._seen: Counter = Counter()

    def _jitter(self, color: Sequence[float]) -> tuple[float, float, float]:
        """The color itself for the first instance, then darker, lighter and slightly turned ones in turn."""
        number = self._seen[tuple(color)]
        self._seen[tuple(color)] += 1
        hue, lightness, saturation = colorsys.rgb_to_hls(*color)
        step = (number + 1) // 2 * (-1 if number % 2 else 1)
        lightness = 0.25 + (lightness - 0.25 + 0.17 * step) % 0.55 if step else lightness
        return colorsys.hls_to_rgb((hue + 0.03 * step) % 1, lightness, saturation)

    def _draw_text_in_mask(self, binary_mask: np.ndarray, text: str, color: Sequence[float]) -> None:
        """Writes where the border of the mask (H, W) and that of the image are farthest, not at the median pixel."""
        depth = cv2.distanceTransform(np.pad(binary_mask.astype(np.uint8), 1), cv2.DIST_L2, 3)
        y, x = np.unravel_index(np.argmax(depth), depth.shape)
        self.draw_text(text, (x, y), color=color)

    def draw_text(self, text: str, position: Sequence[float], **options):
        """Writes, and moves what would leave the image back into it."""
        output = super().draw_text(text, position, **options)
        label = output.ax.texts[-1]
        box = label.get_window_extent(output.canvas.get_renderer()).padded(2)
        x = position[0] - min(0, box.x0) + min(0, output.width - box.x1)
        y = position[1] - min(0, output.height - box.y1) + min(0, box.y0)
        label.set_position((x, y))
        return output


def _enlargement(height: int, width: int) -> int:
    """The whole factor that brings a small picture to a size at which labels can be read."""
    return max(1, min(-(-SHORT_SIDE // min(height, width)), LONG_SIDE // max(height, width)))


def enlarged(image: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) in the size that :func:`draw_panoptic` gives it."""
    height, width = image.shape[:2]
    factor = _enlargement(height, width)
    return np.asarray(Image.fromarray(image).resize((width * factor, height * factor), Image.Resampling.BICUBIC))


def draw_panoptic(
    image: np.ndarray, segment_ids: torch.Tensor | np.ndarray, segments: list[dict], metadata
) -> np.ndarray:
    """Overlays a segmentation and its labels.

    Args:
        image: (H, W, 3) uint8, RGB.
        segment_ids: (H, W), 0 for void.
        segments: a dict for each segment: "id", "category_id" (contiguous), "isthing" and perhaps "score".
        metadata: the dataset's, with class names and colors.

    Returns:
        (f H, f W, 3) uint8, RGB; f is 1 for all but small images.
    """
    factor = _enlargement(*image.shape[:2])
    ids = torch.as_tensor(segment_ids).detach().cpu().to(torch.int64)
    ids = ids.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
    visualizer = _SteadyVisualizer(enlarged(image), metadata)
    # Detectron2 writes into the dicts.
    return visualizer.draw_panoptic_seg(ids, [dict(segment) for segment in segments], alpha=0.6).get_image()


@functools.cache
def cluster_palette(num_clusters: int) -> np.ndarray:
    """Colors (N, 3), uint8, RGB, each as far as can be from those before it (in CIELAB)."""
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    lab = cv2.cvtColor(candidates[None].astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[0]
    vivid = (lab[:, 0] > 45) & (lab[:, 0] < 93) & (np.hypot(lab[:, 1], lab[:, 2]) > 25)
    candidates, lab = candidates[vivid], lab[vivid]
    chosen = [int(np.argmax(np.hypot(lab[:, 1], lab[:, 2])))]
    distance = np.full(len(lab), np.inf)
    while len(chosen) < num_clusters:
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
        chosen.append(int(np.argmax(distance)))
    return candidates[chosen]


def draw_assignment(image: np.ndarray, assignment: np.ndarray, num_clusters: int) -> np.ndarray:
    """Colors every pixel by its cluster, over a faint image.

    Args:
        image: (H, W, 3) uint8, RGB.
        assignment: (h, w) integers, the cluster of each position; the first and last positions are at the borders.
        num_clusters: N.

    Returns:
        (H, W, 3) uint8, RGB.
    """
    rows, columns = (
        np.rint(np.linspace(0, positions - 1, pixels)).astype(np.int64)
        for positions, pixels in zip(assignment.shape, image.shape[:2], strict=True)
    )
    colors = cluster_palette(num_clusters)[assignment[rows[:, None], columns]]
    grey = image.mean(axis=2, keepdims=True)
    return np.rint(0.75 * colors + 0.25 * grey).astype(np.uint8)


def assignments(model: nn.Module, image: torch.Tensor) -> list[np.ndarray]:
    """The nearest cluster center of each position, as each decoder in turn and then the final predictor sees it.

    Args:
        model: a :class:`~kmax_d2.modeling.kmax_deeplab.KMaXDeepLab`.
        image: (3, H, W), RGB, 0 to 255.

    Returns:
        maps (h, w) of cluster indices, each at its own stride.
    """
    result = model.predict(image[None], auxiliary=True)
    predictions = [*result["auxiliary"], result]
    return [prediction["mask_logits"][0].argmax(0).cpu().numpy() for prediction in predictions]


def page(panels: list[list[tuple[str, np.ndarray]]]) -> np.ndarray:
    """A grid of titled pictures, (H, W, 3) uint8, RGB, in rows, all brought to one size, on white; again RGB."""
    images = [image for row in panels for _, image in row]
    width, height = max(image.shape[1] for image in images), max(image.shape[0] for image in images)
    gap = text_size = max(14, round(0.045 * min(height, width)))
    line, columns = round(1.7 * text_size), max(len(row) for row in panels)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, len(panels) * (height + line + gap) + gap), "white")
    draw, font = ImageDraw.Draw(sheet), _font(text_size)
    for row, y in zip(panels, range(gap, sheet.height, height + line + gap), strict=False):
        for (title, image), x in zip(row, range(gap, sheet.width, width + gap), strict=False):
            draw.text((x, y), title, fill="black", font=font)
            scale = min(width / image.shape[1], height / image.shape[0])
            size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
            sheet.paste(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS), (x, y + line))
    return np.asarray(sheet)


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1 has one size only
        return ImageFont.load_default()


@torch.no_grad()
def result_page(model: nn.Module, record: dict, metadata) -> np.ndarray:
    """One image: itself, the ground truth if there is one, the prediction, and each decoder's clusters.

    Args:
        model: a :class:`~kmax_d2.modeling.kmax_deeplab.KMaXDeepLab`.
        record: a dataset's record, or the test mapper's; of the former, "file_name" is enough.
        metadata: the dataset's, with class names and colors.

    Returns:
        (H, W, 3) uint8, RGB: a :func:`page` of three columns.
    """
    if "image" not in record:
        record = PanopticTestMapper(size=model.test_size)(record)
    training = model.training
    model.eval()
    try:
        segment_ids, segments = model([record])[0]["panoptic_seg"]
    finally:
        model.train(training)
    image = read_image(record)
    panels = [("input", enlarged(image))]
    if "pan_seg_file_name" in record:
        true_ids, classes = read_segments(record)
        things = set(metadata.thing_dataset_id_to_contiguous_id.values())
        truth = [{"id": i, "category_id": c, "isthing": c in things} for i, c in enumerate(classes, start=1)]
        panels.append(("ground truth", draw_panoptic(image, true_ids, truth, metadata)))
    panels.append(("prediction", draw_panoptic(image, segment_ids, segments, metadata)))

    pixels = record["image"].flip(0) if model.input_format == "BGR" else record["image"]
    *decoders, final = assignments(model, pixels)
    num_clusters = model.transformer_decoder.centers.shape[0]
    titled = [(f"decoder {number}", assignment) for number, assignment in enumerate(decoders, start=1)]
    if len(panels) < 3:
        titled.insert(0, ("final clusters", final))
    for title, assignment in titled:
        title = f"{title} (stride {_stride(pixels.shape[-2:], assignment.shape)})"
        panels.append((title, draw_assignment(enlarged(image), assignment, num_clusters)))
    return page([panels[start : start + 3] for start in range(0, len(panels), 3)])


def _stride(size: Sequence[int], map_size: Sequence[int]) -> int:
    """The power of two between positions of a map (h, w) whose first one is at the first pixel of an image (H, W)."""
    pixels, positions = max(zip(size, map_size, strict=True))
    return 1 << (max(1, (pixels - 1) // max(1, positions - 1)).bit_length() - 1)
