"""Weights that only the main process can read reach all processes, with the training state."""

from pathlib import Path

import published
import torch
from detectron2.engine import create_ddp_model
from detectron2.utils import comm
from torch import nn

from kmax_d2.checkpoint import KMaXCheckpointer
from kmax_d2.engine import launch
from kmax_d2.errors import UserError


def load_everywhere(folder):
    """Loads files that are in the main process's folder only, and saves what each process then has."""
    torch.set_num_threads(1)
    rank = comm.get_rank()
    results = {}
    for name in ("model.pth", "ckpt-1"):
        torch.manual_seed(7 + rank)
        model = published.build()
        scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters(), lr=1.0), 1)
        checkpointer = KMaXCheckpointer(
            create_ddp_model(model, broadcast_buffers=False, device_ids=None), scheduler=scheduler
        )
        checkpointer.load(str(folder / str(rank) / name))
        results[name] = {"weights": published.weights(model), "epoch": scheduler.last_epoch}
    for name in ("none.pth", "damaged.pth"):
        try:
            checkpointer.load(str(folder / str(rank) / name))
        except UserError as error:
            results[name] = str(error)
    torch.save(results, folder / f"results_{rank}.pth")


def test_weights_that_only_the_main_process_can_read(tmp_path):
    source = published.build()
    (tmp_path / "0").mkdir()
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    scheduler.last_epoch = 5
    KMaXCheckpointer(source, str(tmp_path / "0"), scheduler=scheduler).save("model")
    published.write_checkpoint(Path(tmp_path, "0", "ckpt-1"), published.official_variables(source))
    (tmp_path / "0" / "damaged.pth").write_bytes((tmp_path / "0" / "model.pth").read_bytes()[:9999])
    launch(load_everywhere, 2, dist_url="auto", args=(tmp_path,))
    expected = published.weights(source)
    for rank in range(2):
        results = torch.load(tmp_path / f"results_{rank}.pth", weights_only=True)
        assert "no checkpoint" in results["none.pth"] and "damaged" in results["damaged.pth"]
        assert [results[name]["epoch"] for name in ("model.pth", "ckpt-1")] == [5, 0]
        for name in ("model.pth", "ckpt-1"):
            weights = results[name]["weights"]
            assert all(torch.equal(weights[key], value) for key, value in expected.items())
