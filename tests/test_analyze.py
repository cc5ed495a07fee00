"""Parameters and FLOPs beside the paper's tables."""

import json

import pytest
import torch
from small import options
from torch import nn

from kmax_d2.errors import UserError
from kmax_d2.modeling.kmeans import kmeans_update
from kmax_d2.tools import analyze


@pytest.mark.parametrize(
    ("config", "params", "paper_flops"),
    [
        ("coco/r50", 56.580, 168e9),
        ("coco/maxs", 74.416, 240e9),
        ("cityscapes/r50", 56.401, 434e9),
        ("cityscapes/convnext_b", 121.337, 858e9),
    ],
)
def test_papers_tables(config, params, paper_flops):
    result = analyze.analyze(config)
    assert round(result["params"] / 1e6, 3) == params
    assert result["flops"] == pytest.approx(paper_flops, rel=0.01)
    for unit in ("params", "flops"):
        assert sum(part[unit] for part in result["parts"].values()) == result[unit]
        assert all(part[unit] > 0 for part in result["parts"].values())


def test_flops_are_multiply_adds():
    x = torch.zeros(1, 3, 10, 20)
    with analyze.flop_counter() as counter:
        nn.Conv2d(3, 8, 5, stride=2, padding=2, bias=False)(x)
    assert counter.get_total_flops() // 2 == (5 * 5 * 3) * 8 * (5 * 10)


def test_kmeans_update_counts_as_the_product_with_the_one_hot_assignment():
    with analyze.flop_counter() as counter:
        kmeans_update(torch.zeros(1, 5, 7, dtype=torch.long), torch.zeros(1, 16, 5, 7), 12)
    assert counter.get_total_flops() // 2 == 12 * (5 * 7) * 16


def test_semantic_head_and_training_do_not_count():
    with_head, without = (
        analyze.analyze("", options(MODEL__KMAX__LOSS__SEMANTIC_WEIGHT=weight)) for weight in (1.0, 0.0)
    )
    assert with_head == without
    assert with_head["size"] == [65, 65]


def test_command_line(capsys):
    command = ["--config-file", "coco/r50_tiny", "--size", "65", "97"]
    changed = ["MODEL.KMAX.TRANSFORMER_DECODER.NUM_QUERIES", "65"]
    analyze.main([*command, *changed, "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result.keys() == {"config", "size", "params", "flops", "parts"}
    assert result["config"] == "coco/r50_tiny"
    assert result["size"] == [65, 97]
    assert result["parts"].keys() == {"backbone", "pixel_decoder", "kmax_decoders", "final_predictor"}

    analyze.main([*command, *changed])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("coco/r50_tiny at 65×97")
    total = [cell.strip() for cell in lines[-1].split("|")[1:4]]
    assert total == ["total", f"{result['params'] / 1e6:.3f}", f"{result['flops'] / 1e9:.1f}"]


@pytest.mark.parametrize(
    ("size", "reason"),
    [((0, 65), "0×65"), ((65, 255 * 16 + 1), "axial attention covers 255 positions")],
)
def test_impossible_sizes(size, reason):
    with pytest.raises(UserError, match=reason):
        analyze.analyze("", options(), size)
