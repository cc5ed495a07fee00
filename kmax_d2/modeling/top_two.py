"""The two best queries of each pixel, without the upsampled logits of all queries ever being whole in memory."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

# A strip goes through a few steps and should stay in a core's cache; a GPU is faster with few large strips.
LOGITS_PER_THREAD = 2**17
LOGITS_ON_GPU = 2**26
PIXELS_AT_ONCE = 2**22  # of maps of the original size, which may be a photo's

# Equal functions that are faster on some devices, by the type of the device; kmax_d2.speed adds its own.
FASTER: dict[str, Callable] = {}


class TopTwo(NamedTuple):
    """The two best queries of each pixel.

    Attributes:
        query: (2, H, W) int16 indices, best first; among equal queries the first.
        probability: (2, H, W), softmax over all queries.
    """

    query: torch.Tensor
    probability: torch.Tensor


def row_strips(size: Sequence[int], pixels: int = 0) -> Iterator[slice]:
    """The rows of maps (..., H, W), in strips of about so many pixels, else PIXELS_AT_ONCE."""
    rows = max(1, (pixels or PIXELS_AT_ONCE) // size[-1])
    return (slice(start, start + rows) for start in range(0, size[-2], rows))


def by_rows(function: Callable[..., torch.Tensor], *maps: torch.Tensor) -> torch.Tensor:
    """A function of single pixels of maps (..., H, W), computed strip by strip."""
    size, whole = maps[0].shape[-2:], torch.empty(0)
    for rows in row_strips(size):
        strip = function(*(x[..., rows, :] for x in maps))
        if rows.start == 0:
            whole = strip.new_empty(*strip.shape[:-2], *size)
        whole[..., rows, :] = strip
    return whole


def _interpolation(
    positions: int, pixels: int, extent: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each pixel along one axis of a resized map the two positions that it lies between, and how far."""
    last = positions - 1
    place = torch.arange(pixels, device=device) * ((positions - 1) * extent / max(pixels - 1, 1))
    before = place.long().clamp_max(last)
    return before, (before + 1).clamp_max(last), place - before


def upsampled(
    mask_logits: torch.Tensor, size: tuple[int, int], extent: tuple[float, float]
) -> Iterator[tuple[slice, torch.Tensor]]:
    """The logits (N, h, w) upsampled bilinearly (aligned corners) to `size`: rows and their strip (rows, W, N).

    The caller may modify a strip.
    """
    logits = mask_logits.float().permute(1, 2, 0).contiguous()
    height, width, queries = logits.shape
    device = logits.device
    above, below, down = _interpolation(height, size[0], extent[0], device)
    factor, rest = divmod(size[1] - 1, max(width - 1, 1))
    regular = rest == 0 and factor > 0 and width > 1 and extent[1] == 1
    if regular:  # every position has the same pixels after it, and nothing is to be gathered
        steps = torch.arange(factor, device=device)[:, None] / factor
        logits = torch.cat([logits, logits[:, -1:]], dim=1)
    else:
        left, right, across = _interpolation(width, size[1], extent[1], device)
    at_once = LOGITS_ON_GPU if logits.is_cuda else LOGITS_PER_THREAD * torch.get_num_threads()
    for rows in row_strips(size, max(1, at_once // queries)):
        upper, lower = logits.index_select(0, above[rows]), logits.index_select(0, below[rows])
        strip = torch.lerp(upper, lower, down[rows, None, None])
        if regular:
            yield rows, torch.lerp(strip[:, :-1, None], strip[:, 1:, None], steps).flatten(1, 2)[:, : size[1]]
        else:
            yield rows, torch.lerp(strip.index_select(1, left), strip.index_select(1, right), across[:, None])


def top_two_queries(
    mask_logits: torch.Tensor, size: tuple[int, int], extent: tuple[float, float] = (1.0, 1.0)
) -> TopTwo:
    """Upsamples logits (N, h, w), N ≥ 2, bilinearly (aligned corners) and keeps each pixel's two best queries.

    `extent` is the fraction of the map's height and width that the pixels span; below 1 it excludes padding.
    """
    num_queries, device = len(mask_logits), mask_logits.device
    # The first of several zeros is wanted, so it has the largest weight.
    weight = torch.arange(num_queries, 0, -1, dtype=torch.float32, device=device)

    def weight_of_zero(distance: torch.Tensor) -> torch.Tensor:
        """Weight of the first zero in (..., N), none above zero: (...). Far faster than argmax on a CPU."""
        # Any distance of float32 numbers, but of those next to zero, is then larger than all weights.
        return torch.add(weight, distance, alpha=1e38).amax(-1)

    def index(weight: torch.Tensor) -> torch.Tensor:
        # NaN must not become an index out of range.
        return (num_queries - weight).long().clamp_(0, num_queries - 1)

    query = torch.empty(2, *size, dtype=torch.int16, device=device)
    probability = torch.empty(2, *size, device=device)
    for rows, strip in upsampled(mask_logits, size, extent):
        strip -= strip.amax(-1, keepdim=True)
        first = query[0, rows] = index(weight_of_zero(strip))
        partition = strip.exp_().sum(-1)
        runner_up = strip.scatter_(-1, first[..., None], -1.0).amax(-1)
        probability[:, rows] = torch.stack([partition.reciprocal(), runner_up / partition])
        query[1, rows] = index(weight_of_zero(strip.sub_(runner_up[..., None])))
    return TopTwo(query, probability)


def find_top_two(mask_logits: torch.Tensor, size: tuple[int, int], extent: tuple[float, float] = (1.0, 1.0)) -> TopTwo:
    """:func:`top_two_queries`, or the faster function for the device of the logits that :mod:`kmax_d2.speed` has."""
    function = FASTER.get(mask_logits.device.type, top_two_queries)
    return TopTwo(*function(mask_logits, size, extent))


def marginal_classes(
    class_logits: torch.Tensor, mask_logits: torch.Tensor, size: tuple[int, int], extent: tuple[float, float] = (1, 1)
) -> torch.Tensor:
    """(H, W) int64, the class with the largest sum over the queries of class probability times mask probability.

    Arguments as for :class:`~kmax_d2.modeling.merging.MaskWiseMerging`.
    """
    classes = class_logits.float().softmax(1)[:, :-1]
    # Dividing by the sum over queries would not change which class is the largest.
    best = torch.empty(size, dtype=torch.int64, device=mask_logits.device)
    for rows, strip in upsampled(mask_logits, size, extent):
        best[rows] = (strip.sub_(strip.amax(-1, keepdim=True)).exp_() @ classes).argmax(-1)
    return best
