"""The two best queries of each pixel, against the softmax of all upsampled logits, and the same in a GPU kernel."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_merging import placed, plain_probability

from kmax_d2.modeling.merging import MaskWiseMerging
from kmax_d2.modeling.top_two import FASTER, top_two_queries
from kmax_d2.speed import top_two_on_gpu

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="PyTorch comes without Triton on this platform")
PLACES = [
    ((5, 7), (17, 25), None),
    ((17, 25), (65, 97), (50, 80)),
    ((9, 9), (9, 9), None),
    ((6, 11), (40, 23), (40, 1)),
    ((3, 3), (100, 70), (99, 70)),
    ((2, 1), (33, 1), None),
    ((5, 7), (1, 1), None),
    ((5, 7), (9, 1), None),
    ((1, 1), (1, 3), None),
]


@pytest.mark.parametrize("queries", [2, 6, 130])
@pytest.mark.parametrize(("small", "size", "crop"), PLACES)
def test_equals_the_softmax_of_all_logits(small, size, crop, queries):
    mask_logits = torch.randn(queries, *small) * 4
    top = top_two_queries(mask_logits, *placed(size, crop))
    probability = plain_probability(mask_logits, size, crop)
    best = probability.topk(2, dim=0)
    torch.testing.assert_close(top.probability, best.values, rtol=1e-4, atol=1e-5)
    # Where two queries are as good as each other, either may be named.
    torch.testing.assert_close(probability.gather(0, top.query.long()), best.values, rtol=1e-4, atol=1e-5)
    assert (top.query[0] != top.query[1]).all()
    clear = best.values[0] - best.values[1] > 1e-3
    assert clear.float().mean() > 0.9
    assert torch.equal(top.query[0][clear].long(), best.indices[0][clear])


def test_of_equal_queries_the_first_comes_first():
    mask_logits = torch.randint(0, 3, (7, 20, 30)).float()
    top = top_two_queries(mask_logits, (20, 30))
    assert torch.equal(top.query.long(), mask_logits.sort(dim=0, descending=True, stable=True).indices[:2])


def test_what_is_not_a_number_names_no_query_that_is_not_there():
    top = top_two_queries(torch.full((5, 3, 4), torch.nan), (9, 13))
    assert top.query.min() >= 0 and top.query.max() < 5


# --- the GPU kernel ---


def test_the_function_for_a_device_is_used(monkeypatch):
    assert FASTER["cuda"] is top_two_on_gpu
    mask_logits, places = torch.randn(3, 5, 7), []
    monkeypatch.setitem(FASTER, "cpu", lambda logits, *place: places.append(place) or top_two_queries(logits, *place))
    MaskWiseMerging([True] * 4)(torch.randn(3, 5), mask_logits, (9, 13), (0.5, 1.0))
    assert places == [((9, 13), (0.5, 1.0))]


def test_where_the_kernel_fails_the_strips_take_its_place(caplog):
    mask_logits = torch.randn(3, 5, 7)  # on a CPU
    assert torch.equal(top_two_on_gpu(mask_logits, (9, 13))[0], top_two_queries(mask_logits, (9, 13)).query)
    assert "without its Triton kernel" in caplog.text


INTERPRETED = """
import torch
from kmax_d2.modeling.top_two import top_two_queries
from kmax_d2.speed.top_two_triton import top_two_in_one_kernel

torch.manual_seed(0)
for queries, small, size, extent, dtype in (
    (6, (5, 7), (17, 25), (1.0, 1.0), torch.float32),
    (11, (9, 6), (29, 40), (0.7, 0.9), torch.float32),
    (19, (3, 3), (9, 50), (1.0, 0.5), torch.bfloat16),
    (2, (2, 1), (33, 1), (1.0, 1.0), torch.float32),
):
    mask_logits = (torch.randn(queries, *small) * 4).to(dtype)
    found, expected = (f(mask_logits, size, extent) for f in (top_two_in_one_kernel, top_two_queries))
    torch.testing.assert_close(found[1], expected.probability, rtol=1e-5, atol=1e-6)
    assert torch.equal(found[0], expected.query)
mask_logits = torch.randint(0, 3, (7, 8, 9)).float()
found, expected = (f(mask_logits, (8, 9), (1.0, 1.0)) for f in (top_two_in_one_kernel, top_two_queries))
assert torch.equal(found[0], expected.query)
print("equal")
"""


@needs_triton
def test_kernel_equals_the_strips():
    """Run by Triton's interpreter, which needs no GPU."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "equal\n", done.stderr


@needs_triton
@pytest.mark.parametrize("logits", ["*fp32", "*bf16"])
def test_kernel_compiles_and_stays_in_registers(logits, tmp_path, monkeypatch):
    """For an H100: its 65536 registers are enough for the 2048 threads that it can hold, and nothing is spilled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kmax_d2.speed import top_two_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tile = {"tile_height": top_two_triton.TILE_HEIGHT, "tile_width": top_two_triton.TILE_WIDTH}
    types = [logits, "*i16", "*fp32", *["i32"] * 5, "fp32", "fp32", "constexpr", "constexpr"]
    kernel = top_two_triton.top_two_kernel
    source = ASTSource(kernel, dict(zip(kernel.arg_names, types, strict=True)), tile)
    options = {"num_warps": top_two_triton.WARPS}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.metadata.shared == 0
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    usage = dict(part.split(":") for part in usage.split() if part.count(":") == 1 and part[-1].isdigit())
    assert int(usage["REG"]) <= 32
    assert usage["STACK"] == usage["LOCAL"] == "0"
