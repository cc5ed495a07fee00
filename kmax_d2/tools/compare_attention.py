"""Tests the paper's central claim on a laptop: the quickstart's model with k-means and with softmax cross-attention.

python -m kmax_d2.tools.compare_attention [--output DIR] [--seeds 3] [NAME VALUE ...]

Each variant is trained with each seed, on the same images for the same number of iterations, and evaluated on the way.
The result is a plot of PQ over iterations (mean and range over the seeds), a table, and a JSON file. If interrupted,
run it again: it continues with the trainings that are not finished.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from ..command_line import ConfigParser, run_program, whole

PARSER = ConfigParser(__doc__, config_file=None)
PARSER.add_argument("--output", default="output/compare_attention", metavar="DIR", help="default: %(default)s")
PARSER.add_argument(
    "--seeds", type=whole("--seeds", 1), default=3, metavar="N", help="seeds 1 to N (default: %(default)s)"
)

PARSER.parse_if_main(__name__)

import numpy as np
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from matplotlib.figure import Figure
from tabulate import tabulate

from ..engine import Trainer, ready_config
from ..engine.ema import final_name
from ..engine.log import quiet_log
from ..files import make_folder, write_json
from .quickstart import CONFIG

ATTENTIONS = {"KMeansCrossAttention": "k-means", "SoftmaxCrossAttention": "spatial softmax"}
DEFAULTS = ("SOLVER.MAX_ITER", 1000, "TEST.EVAL_PERIOD", 100, "TEST.PICTURES", 0)
PANOPTIC_ONLY = ("MODEL.KMAX.TEST.SEMANTIC_ON", False, "MODEL.KMAX.TEST.INSTANCE_ON", False)


def make_config(attention: str, seed: int, folder: Path, options: Sequence[str]) -> CfgNode:
    """Returns the quickstart's config for one training; only panoptic quality is evaluated."""
    variant = ("OUTPUT_DIR", str(folder), "SEED", seed, "MODEL.KMAX.TRANSFORMER_DECODER.CROSS_ATTENTION", attention)
    return ready_config(CONFIG, [*DEFAULTS, *options], [*variant, *PANOPTIC_ONLY])


def train(cfg: CfgNode) -> dict[int, float]:
    """Trains, unless an earlier run has done so, and returns PQ in percent by iteration."""
    folder = make_folder(Path(cfg.OUTPUT_DIR))
    curve_file = folder / "curve.json"
    if not curve_file.is_file():
        seed_all_rng(cfg.SEED)
        trainer = Trainer(cfg)
        trainer.train()
        evaluated = trainer.storage.history(final_name(cfg, "panoptic_seg/PQ")).values()
        # An evaluation during training runs before the iteration is counted.
        curve = {min(iteration + 1, cfg.SOLVER.MAX_ITER): pq for pq, iteration in evaluated}
        write_json(curve_file, curve)
    return {int(iteration): pq for iteration, pq in json.loads(curve_file.read_text()).items()}


def draw(curves: dict[str, list[dict[int, float]]], file: Path) -> None:
    """Plots PQ over iterations: for each variant, the mean and a band from the lowest to the highest seed."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, runs in curves.items():
        iterations, values = list(runs[0]), np.array([list(run.values()) for run in runs])
        axes.plot(iterations, values.mean(0), marker="o", markersize=3, label=label)
        axes.fill_between(iterations, values.min(0), values.max(0), alpha=0.2, linewidth=0)
    title = f"mean and range of {len(runs)} seeds"
    axes.set(xlabel="iterations", ylabel="PQ on the held-out images (%)", ylim=(0, None), title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120, format="png")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command line; None takes that of the process."""
    args = PARSER.parse(argv)
    output = Path(args.output)
    make_config("KMeansCrossAttention", 1, output, args.opts)  # fails before anything is written
    make_folder(output)
    quiet_log(str(output))
    curves: dict[str, list[dict[int, float]]] = {label: [] for label in ATTENTIONS.values()}
    # Seed by seed, so that an interrupted comparison has complete pairs.
    for seed in range(1, args.seeds + 1):
        for name, label in ATTENTIONS.items():
            print(f"{label}, seed {seed}")
            curves[label].append(train(make_config(name, seed, output / f"{name}_seed{seed}", args.opts)))
    last = {label: [list(run.values())[-1] for run in runs] for label, runs in curves.items()}
    rows = [(label, np.mean(values), min(values), max(values)) for label, values in last.items()]
    print(tabulate(rows, headers=["cross-attention", "PQ", "lowest", "highest"], floatfmt=".1f", tablefmt="github"))
    write_json(output / "results.json", curves, indent=2)
    draw(curves, output / "pq_over_iterations.png")
    print(f"the plot and the numbers are in {output}")


if __name__ == "__main__":
    run_program(main)
