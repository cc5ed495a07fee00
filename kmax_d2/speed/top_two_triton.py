"""The two best queries of each pixel in one Triton kernel: the upsampled logits never leave the registers."""

import torch
import triton
import triton.language as tl

# Pixels of a program, one for each of its threads. Neighbors share what they read.
TILE_HEIGHT, TILE_WIDTH = 4, 32
WARPS = TILE_HEIGHT * TILE_WIDTH // 32


def top_two_in_one_kernel(
    mask_logits: torch.Tensor, size: tuple[int, int], extent: tuple[float, float] = (1.0, 1.0)
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`~kmax_d2.modeling.top_two.top_two_queries` on a GPU, which never waits for it."""
    logits = mask_logits.contiguous()
    queries, height, width = logits.shape
    query = torch.empty(2, *size, dtype=torch.int16, device=logits.device)
    probability = torch.empty(2, *size, dtype=torch.float32, device=logits.device)
    grid = triton.cdiv(size[1], TILE_WIDTH), triton.cdiv(size[0], TILE_HEIGHT)
    spacing = ((n - 1) * share / max(m - 1, 1) for n, m, share in zip((height, width), size, extent, strict=True))
    numbers = queries, height, width, *size, *spacing
    with torch.cuda.device_of(logits):  # Triton launches on the current one
        top_two_kernel[grid](logits, query, probability, *numbers, TILE_HEIGHT, TILE_WIDTH, num_warps=WARPS)
    return query, probability


@triton.jit
def top_two_kernel(
    logits,
    query,
    probability,
    queries,
    height,
    width,
    out_height,
    out_width,
    row_spacing,
    column_spacing,
    tile_height: tl.constexpr,
    tile_width: tl.constexpr,
):
    """A tile of pixels: logits (N, h, w) to query (2, H, W) and probability (2, H, W), all contiguous."""
    pixel = tl.arange(0, tile_height * tile_width)
    row = tl.program_id(1) * tile_height + pixel // tile_width
    column = tl.program_id(0) * tile_width + pixel % tile_width
    y = row.to(tl.float32) * row_spacing
    x = column.to(tl.float32) * column_spacing
    above = tl.minimum(y.to(tl.int32), height - 1)
    below = tl.minimum(above + 1, height - 1)
    left = tl.minimum(x.to(tl.int32), width - 1)
    right = tl.minimum(left + 1, width - 1)
    down = y - above
    across = x - left
    above_left = above * width + left
    above_right = above * width + right
    below_left = below * width + left
    below_right = below * width + right

    best = tl.full(pixel.shape, float("-inf"), tl.float32)
    runner_up = best
    first = tl.zeros(pixel.shape, tl.int32)
    second = first
    partition = tl.zeros(pixel.shape, tl.float32)
    for q in range(queries):
        a = tl.load(logits + above_left).to(tl.float32)
        b = tl.load(logits + above_right).to(tl.float32)
        c = tl.load(logits + below_left).to(tl.float32)
        d = tl.load(logits + below_right).to(tl.float32)
        a += down * (c - a)
        b += down * (d - b)
        value = a + across * (b - a)
        better = value > best
        # The sum of exponentials is relative to the best so far: one exponential rescales it or adds to it.
        share = tl.exp2(tl.abs(value - best) * -1.4426950408889634)
        partition = tl.where(better, partition * share + 1, partition + share)
        second = tl.where(better, first, tl.where(value > runner_up, q, second))
        runner_up = tl.where(better, best, tl.maximum(runner_up, value))
        first = tl.where(better, q, first)
        best = tl.maximum(best, value)
        logits += height * width

    inside = (row < out_height) & (column < out_width)
    place = row * out_width + column
    area = out_height * out_width
    tl.store(query + place, first.to(tl.int16), inside)
    tl.store(query + area + place, second.to(tl.int16), inside)
    tl.store(probability + place, 1 / partition, inside)
    tl.store(probability + area + place, tl.exp(runner_up - best) / partition, inside)
