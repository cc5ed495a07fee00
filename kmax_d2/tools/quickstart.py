"""Trains a small kMaX-DeepLab on the embedded dataset in minutes, evaluates it, and draws what it segments.

python -m kmax_d2.tools.quickstart [--output DIR] [NAME VALUE ...]
"""

from collections.abc import Sequence
from pathlib import Path

from ..command_line import ConfigParser, run_program

PARSER = ConfigParser(__doc__, config_file=None)
PARSER.add_argument("--output", default="output/quickstart", metavar="DIR", help="default: %(default)s")

PARSER.parse_if_main(__name__)

import time

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.utils.env import seed_all_rng
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from ..checkpoint import newest_checkpoint
from ..data import PanopticTestMapper
from ..engine import Trainer, ready_config
from ..engine.ema import final_name
from ..engine.log import quiet_log
from ..engine.setup import dataset_metadata
from ..errors import UserError
from ..files import lock_folder, write_json, write_png
from ..visualization import result_page

CONFIG = "shapes/quickstart"
NUM_PICTURES = 8


def summarize(results: dict, cfg: CfgNode) -> dict[str, float]:
    """Returns the numbers of the table, in percent: PQ, PQ_th, PQ_st, AP, and mIoU of the averaged weights, if any."""
    tasks = ("panoptic_seg", "segm", "sem_seg")
    panoptic, instance, semantic = (results[final_name(cfg, task)] for task in tasks)
    summary = {name: panoptic[name] for name in ("PQ", "PQ_th", "PQ_st")}
    return summary | {"AP": instance["AP"], "mIoU": semantic["mIoU"]}


def draw_pictures(cfg: CfgNode, model: nn.Module, folder: Path) -> None:
    """Writes a page for each of the first held-out images: input, ground truth, prediction, and decoder clusters."""
    records = DatasetCatalog.get(cfg.DATASETS.TEST[0])[:NUM_PICTURES]
    for record in tqdm(records, desc="drawing pictures", unit="image"):
        page = result_page(model, PanopticTestMapper(cfg)(record), dataset_metadata(cfg))
        write_png(folder / f"{Path(record['file_name']).stem}.png", page)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command line; None takes that of the process."""
    args = PARSER.parse(argv)
    start = time.perf_counter()
    output = Path(args.output)
    cfg = ready_config(CONFIG, ["OUTPUT_DIR", str(output), *args.opts])
    results_file = output / "results.json"
    if results_file.exists() or newest_checkpoint(str(output)):
        raise UserError(f"{output} has the results of an earlier run: choose another folder with --output")
    lock_folder(output)
    quiet_log(str(output))
    seed_all_rng(cfg.SEED)
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        DatasetCatalog.get(name)  # draws the images, with its own progress bar, before anything else is shown
    trainer = Trainer(cfg)
    summary = summarize(trainer.train(), cfg) | {"seconds": time.perf_counter() - start}
    draw_pictures(cfg, trainer.final_model, output / "pictures")

    print(tabulate([list(summary.values())], headers=list(summary), floatfmt=".1f", tablefmt="github"))
    write_json(results_file, summary, indent=2)
    print(f"checkpoint, log, and pictures are in {output}")


if __name__ == "__main__":
    run_program(main)
