"""The paper's central claim on a laptop: the quickstart's model with k-means and with softmax cross-attention.

Every variant is trained with every seed, on the same images for as many iterations, and evaluated as it goes. The
result is a plot of PQ over iterations (mean and range over the seeds), a table and a JSON file. Run again after an
interruption, it goes on with the trainings that are not done.

`python -m kmax_d2.tools.compare_attention [--output DIR] [--seeds 3] [NAME VALUE ...]`
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from matplotlib.figure import Figure
from tabulate import tabulate

from ..engine import load_config
from ..engine.setup import choose_device, prepare_datasets
from ..errors import exit_on_user_error
from .quickstart import CONFIG, QuickstartTrainer, quiet_log

ATTENTIONS = {"KMeansCrossAttention": "k-means", "SoftmaxCrossAttention": "spatial softmax"}
ITERATIONS = 1000
EVAL_PERIOD = 100


def make_config(attention: str, seed: int, folder: Path, options: list[str]) -> CfgNode:
    """The quickstart's config for one training; only panoptic quality is evaluated."""
    changes = {
        "OUTPUT_DIR": str(folder),
        "SEED": seed,
        "MODEL.KMAX.TRANSFORMER_DECODER.CROSS_ATTENTION": attention,
        "MODEL.KMAX.TEST.SEMANTIC_ON": False,
        "MODEL.KMAX.TEST.INSTANCE_ON": False,
    }
    defaults = ["SOLVER.MAX_ITER", ITERATIONS, "TEST.EVAL_PERIOD", EVAL_PERIOD]
    cfg = load_config(CONFIG, [*defaults, *options, *(part for pair in changes.items() for part in pair)])
    choose_device(cfg)
    prepare_datasets(cfg)
    cfg.freeze()
    return cfg


def train(cfg: CfgNode) -> dict[int, float]:
    """Trains, unless that was done before, and gives PQ in percent by iteration."""
    folder = Path(cfg.OUTPUT_DIR)
    curve_file = folder / "curve.json"
    if not curve_file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        seed_all_rng(cfg.SEED)
        trainer = QuickstartTrainer(cfg)
        trainer.train()
        evaluated = trainer.storage.history("panoptic_seg/PQ").values()
        # An evaluation within the training comes before the count of its iteration.
        curve = {min(iteration + 1, cfg.SOLVER.MAX_ITER): pq for pq, iteration in evaluated}
        unfinished = curve_file.with_suffix(".part")
        unfinished.write_text(json.dumps(curve))
        os.replace(unfinished, curve_file)
    return {int(iteration): pq for iteration, pq in json.loads(curve_file.read_text()).items()}


def draw(curves: dict[str, list[dict[int, float]]], file: Path) -> None:
    """PQ over iterations: a line of means and a band from the lowest to the highest seed for each variant."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, runs in curves.items():
        iterations = list(runs[0])
        values = np.array([list(run.values()) for run in runs])
        (line,) = axes.plot(iterations, values.mean(0), marker="o", markersize=3, label=label)
        axes.fill_between(iterations, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_xlabel("iterations")
    axes.set_ylabel("PQ on the held-out images (%)")
    axes.set_title(f"mean and range of {len(next(iter(curves.values())))} seeds")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="output/compare_attention", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 1 to N (default: %(default)s)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="NAME VALUE", help="config options to change")
    args = parser.parse_args()

    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    quiet_log(output)
    curves: dict[str, list[dict[int, float]]] = {label: [] for label in ATTENTIONS.values()}
    # Seed by seed, so that an interrupted comparison has whole pairs.
    for seed in range(1, args.seeds + 1):
        for name, label in ATTENTIONS.items():
            print(f"{label}, seed {seed}")
            curves[label].append(train(make_config(name, seed, output / f"{name}_seed{seed}", args.opts)))
    rows = []
    for label, runs in curves.items():
        last = [list(run.values())[-1] for run in runs]
        rows.append([label, np.mean(last), min(last), max(last)])
    print(tabulate(rows, headers=["cross-attention", "PQ", "lowest", "highest"], floatfmt=".1f", tablefmt="github"))
    (output / "results.json").write_text(json.dumps(curves, indent=2))
    draw(curves, output / "pq_over_iterations.png")
    print(f"the plot and the numbers are in {output}")


if __name__ == "__main__":
    exit_on_user_error(main)
