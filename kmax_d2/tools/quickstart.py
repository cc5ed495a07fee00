"""Trains a small kMaX-DeepLab on the embedded dataset in minutes, evaluates it, and draws what it segments.

python -m kmax_d2.tools.quickstart [--output DIR] [NAME VALUE ...]
"""

from collections.abc import Sequence
from pathlib import Path

from ..command_line import ConfigParser, run_program

PARSER = ConfigParser(__doc__, config_file=None)
PARSER.add_argument("--output", default="output/quickstart", metavar="DIR", help="default: %(default)s")

if __name__ == "__main__":
    PARSER.parse()  # answers --help and mistakes before the slow imports

import time

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import CommonMetricPrinter, EventWriter
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from ..engine import Trainer, ready_config
from ..engine.log import quiet_log
from ..engine.setup import dataset_metadata
from ..files import lock_folder, write_json, write_png
from ..visualization import result_page

CONFIG = "shapes/quickstart"
NUM_PICTURES = 8
LOSS_PERIOD = 20  # iterations between updates of the loss on the progress bar


class ProgressBar(HookBase):
    """Shows one line on the terminal in place of Detectron2's long ones, which go to the log file."""

    def before_train(self) -> None:
        """Opens the bar."""
        self.bar = tqdm(total=self.trainer.max_iter, desc="training", unit="it", mininterval=2.0, dynamic_ncols=True)

    def after_step(self) -> None:
        """Advances the bar by an iteration."""
        if self.trainer.iter % LOSS_PERIOD == 0:
            loss = self.trainer.storage.history("total_loss").median(LOSS_PERIOD)
            self.bar.set_postfix_str(f"loss {loss:.2f}", refresh=False)
        self.bar.update()

    def after_train(self) -> None:
        """Closes the bar."""
        self.bar.close()


class QuickstartTrainer(Trainer):
    """The project's trainer with a progress bar. It evaluates the final model only, not the raw weights beside it."""

    def build_hooks(self) -> list[HookBase | None]:
        """Adds the bar, and replaces the evaluation."""
        hooks = [hook for hook in super().build_hooks() if not isinstance(hook, EvalHook)]
        hooks.insert(-1, EvalHook(self.cfg.TEST.EVAL_PERIOD, self._test_final_model))  # its results are then written
        return [ProgressBar(), *hooks]

    def _test_final_model(self) -> dict:
        tqdm.write("evaluating the held-out images")
        self._last_eval_results = self.test(self.cfg, self.final_model)
        return self._last_eval_results

    def build_writers(self) -> list[EventWriter]:
        """Leaves out the writer that prints to the terminal."""
        return [writer for writer in super().build_writers() if not isinstance(writer, CommonMetricPrinter)]


def summarize(results: dict, seconds: float) -> dict[str, float]:
    """Returns the numbers of the table: PQ, PQ_th, PQ_st, AP, and mIoU in percent, and the total time in seconds."""
    panoptic = {name: results["panoptic_seg"][name] for name in ("PQ", "PQ_th", "PQ_st")}
    return panoptic | {"AP": results["segm"]["AP"], "mIoU": results["sem_seg"]["mIoU"], "seconds": seconds}


def draw_pictures(cfg: CfgNode, model: nn.Module, folder: Path) -> None:
    """Writes a page for each of the first held-out images: input, ground truth, prediction, and decoder clusters."""
    records = DatasetCatalog.get(cfg.DATASETS.TEST[0])[:NUM_PICTURES]
    for record in tqdm(records, desc="drawing pictures", unit="image"):
        page = result_page(model, record, dataset_metadata(cfg))
        write_png(folder / f"{Path(record['file_name']).stem}.png", page)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command line; None takes that of the process."""
    args = PARSER.parse(argv)
    start = time.perf_counter()
    output = Path(args.output)
    cfg = ready_config(CONFIG, ["OUTPUT_DIR", str(output), *args.opts])
    lock_folder(output)
    results_file = output / "results.json"
    results_file.unlink(missing_ok=True)  # the file is there only if the run has finished
    quiet_log(str(output))
    seed_all_rng(cfg.SEED)
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        DatasetCatalog.get(name)  # draws the images, with its own progress bar, before anything else is shown
    trainer = QuickstartTrainer(cfg)
    results = trainer.train()
    summary = summarize(results, time.perf_counter() - start)
    draw_pictures(cfg, trainer.final_model, output / "pictures")

    print(tabulate([list(summary.values())], headers=list(summary), floatfmt=".1f", tablefmt="github"))
    write_json(results_file, summary, indent=2)
    print(f"checkpoint, log, and pictures are in {output}")


if __name__ == "__main__":
    run_program(main)
