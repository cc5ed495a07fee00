"""Batch norm over two processes without a GPU sees the joint batch."""

import pytest
import torch
from detectron2.utils import comm
from small import options

from kmax_d2.engine import launch, load_config
from kmax_d2.engine.setup import choose_device
from kmax_d2.modeling.layers import LinearBN


def make_layer():
    cfg = load_config("", options(MODEL__KMAX__NORM="SyncBN"))
    choose_device(cfg)
    torch.manual_seed(0)
    return LinearBN(5, 7, norm=cfg.MODEL.KMAX.NORM)


def make_input():
    return torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(1)) + torch.arange(4.0)[:, None, None]


def run_half(file):
    torch.set_num_threads(1)
    layer = make_layer()
    half = make_input().chunk(2)[comm.get_rank()]
    out = layer(half)
    out.square().sum().backward()
    grads = comm.gather(layer.linear.weight.grad)
    outs = comm.gather(out.detach())
    if comm.is_main_process():
        state = {
            "out": torch.cat(outs),
            "grad": sum(grads),
            "mean": layer.norm.running_mean,
            "var": layer.norm.running_var,
        }
        torch.save(state, file)


def test_two_processes_normalize_as_one(tmp_path):
    file = str(tmp_path / "state.pth")
    launch(run_half, 2, dist_url="auto", args=(file,))
    both = torch.load(file, weights_only=True)
    layer = make_layer()
    out = layer(make_input())
    out.square().sum().backward()
    torch.testing.assert_close(both["out"], out.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both["grad"], layer.linear.weight.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(both["mean"], layer.norm.running_mean)
    # The single process divides by n - 1, as PyTorch does.
    n = out.shape[0] * out.shape[1]
    assert both["var"].sub(0.99).mul(n / (n - 1)).tolist() == pytest.approx(
        layer.norm.running_var.sub(0.99).tolist(), rel=1e-3
    )
