"""The main job in minutes: train a small kMaX-DeepLab on the embedded dataset, evaluate it, draw what it segments.

`python -m kmax_d2.tools.quickstart [--output DIR] [NAME VALUE ...]`
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import JSONWriter, TensorboardXWriter
from detectron2.utils.logger import setup_logger
from PIL import Image
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from ..engine import Trainer, load_config
from ..engine.setup import choose_device, prepare_datasets
from ..errors import exit_on_user_error
from ..visualization import result_page

CONFIG = "shapes/quickstart"
NUM_PICTURES = 8
LOSS_PERIOD = 20  # iterations from one loss on the progress bar to the next


class ProgressBar(HookBase):
    """One line on the terminal in place of Detectron2's long ones, which go to the log file."""

    def before_train(self) -> None:
        self.bar = tqdm(total=self.trainer.max_iter, desc="training", unit="it", mininterval=2.0, dynamic_ncols=True)

    def after_step(self) -> None:
        if self.trainer.iter % LOSS_PERIOD == 0:
            loss = self.trainer.storage.history("total_loss").median(LOSS_PERIOD)
            self.bar.set_postfix_str(f"loss {loss:.2f}", refresh=False)
        self.bar.update()

    def after_train(self) -> None:
        self.bar.close()


class QuickstartTrainer(Trainer):
    """The project's trainer with a progress bar."""

    def build_hooks(self) -> list[HookBase]:
        return [*super().build_hooks(), ProgressBar()]

    def build_writers(self) -> list:
        return [
            JSONWriter(os.path.join(self.cfg.OUTPUT_DIR, "metrics.json")),
            TensorboardXWriter(self.cfg.OUTPUT_DIR),
        ]


def summarise(results: dict, seconds: float) -> dict[str, float]:
    """The numbers of the table: PQ, PQ_th, PQ_st, AP and mIoU in percent, and the seconds that it all took."""
    return {
        "PQ": results["panoptic_seg"]["PQ"],
        "PQ_th": results["panoptic_seg"]["PQ_th"],
        "PQ_st": results["panoptic_seg"]["PQ_st"],
        "AP": results["segm"]["AP"],
        "mIoU": results["sem_seg"]["mIoU"],
        "seconds": seconds,
    }


def draw_pictures(cfg: CfgNode, model: nn.Module, folder: Path) -> None:
    """Writes a page for each of the first held-out images: input, truth, result, and every decoder's clusters."""
    folder.mkdir(parents=True, exist_ok=True)
    name = cfg.DATASETS.TEST[0]
    for record in tqdm(DatasetCatalog.get(name)[:NUM_PICTURES], desc="drawing pictures", unit="image"):
        page = result_page(model, record, MetadataCatalog.get(name))
        Image.fromarray(page).save(folder / f"{Path(record['file_name']).stem}.png")


def quiet_log(output: Path) -> None:
    """The whole log goes to a file in `output`, and of Detectron2's only warnings to the terminal."""
    setup_logger(name="kmax_d2")
    setup_logger(str(output), name="fvcore")
    for handler in setup_logger(str(output)).handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.WARNING)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="output/quickstart", metavar="DIR", help="default: %(default)s")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="NAME VALUE", help="config options to change")
    args = parser.parse_args()

    start = time.perf_counter()
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    results_file = output / "results.json"
    # Whoever finds this file finds the results of a run that came to its end.
    results_file.unlink(missing_ok=True)
    quiet_log(output)
    cfg = load_config(CONFIG, ["OUTPUT_DIR", str(output), *args.opts])
    choose_device(cfg)
    prepare_datasets(cfg)
    cfg.freeze()
    seed_all_rng(cfg.SEED)
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        DatasetCatalog.get(name)  # draws the images, with its own progress, before anything else is shown
    trainer = QuickstartTrainer(cfg)
    trainer.train()
    print("evaluating the held-out images")
    summary = summarise(Trainer.test(cfg, trainer.model), time.perf_counter() - start)
    draw_pictures(cfg, trainer.model, output / "pictures")

    print(tabulate([list(summary.values())], headers=list(summary), floatfmt=".1f", tablefmt="github"))
    unfinished = results_file.with_suffix(".json.part")
    unfinished.write_text(json.dumps(summary, indent=2))
    os.replace(unfinished, results_file)
    print(f"checkpoint, log and pictures are in {output}")


if __name__ == "__main__":
    exit_on_user_error(main)
