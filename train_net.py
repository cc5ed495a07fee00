#!/usr/bin/env python
"""Trains and evaluates kMaX-DeepLab with Detectron2's arguments; `--help` lists them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from kmax_d2.checkpoint import KMaXCheckpointer, newest_checkpoint
from kmax_d2.command_line import run_program
from kmax_d2.engine import Trainer, launch, setup
from kmax_d2.engine.log import log_to
from kmax_d2.errors import UserError
from kmax_d2.evaluation import verify
from kmax_d2.files import lock_folder
from kmax_d2.speed import inference_model

LONG = 40  # lines


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses a command line, None for that of the process: Detectron2's arguments, and those of this project."""
    ours, parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False), default_argument_parser()
    for each in (ours, parser):
        for name, split in (("--train-data", "training"), ("--test-data", "test")):
            each.add_argument(
                name,
                nargs=3,
                metavar=("IMAGES", "PNGS", "JSON"),
                help=f"your own {split} data in COCO panoptic format: image folder, PNG folder, JSON file",
            )
        each.add_argument(
            "--save-predictions",
            metavar="DIR",
            help="write the predictions of an evaluation to this folder, in the formats of the benchmark servers",
        )
        each.add_argument(
            "--freeze", metavar="PARTS", help="parts that do not learn, such as backbone or backbone,pixel_decoder"
        )
        each.add_argument(
            "--scale-schedule",
            type=int,
            metavar="BATCH",
            help="images of a step; scales the learning rate with it, and the numbers of iterations inversely",
        )
    parser.set_defaults(dist_url=None)
    # Detectron2's parser takes everything after the first config option for options; ours may follow them.
    args, rest = ours.parse_known_args(argv)
    args = parser.parse_args(rest, args)
    if args.dist_url is None and args.num_machines > 1:
        raise UserError("--num-machines needs --dist-url, such as tcp://ADDRESS-OF-MACHINE-0:29500")
    args.dist_url = args.dist_url or "auto"  # a free port, so that several runs do not meet at one
    if args.save_predictions:
        args.opts = ["MODEL.KMAX.TEST.SAVE_PREDICTIONS", args.save_predictions, *args.opts]
    if args.freeze:
        args.opts = ["SOLVER.FREEZE", args.freeze.split(","), *args.opts]
    return args


def run(args: argparse.Namespace) -> None:
    """Trains, or evaluates with `--eval-only`, in one process."""
    setup_logger(distributed_rank=comm.get_rank(), name="kmax_d2")
    cfg = setup(args)
    claim_output(cfg, args)
    for handler in log_to(cfg.OUTPUT_DIR):  # log.txt has the long messages, such as config and model
        handler.addFilter(lambda record: record.getMessage().count("\n") < LONG)
    default_setup(cfg, args)
    if not args.eval_only:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        trainer.train()
        return
    Trainer.require_test_data(cfg)
    model = Trainer.build_model(cfg)
    checkpointer = KMaXCheckpointer(model, save_dir=cfg.OUTPUT_DIR, complete=True)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    results = Trainer.test(cfg, inference_model(model, cfg))
    if comm.is_main_process():
        verify(cfg, results)


def claim_output(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Raises UserError where the run would overwrite another one, or `--resume` finds nothing to evaluate."""
    has_checkpoint = newest_checkpoint(cfg.OUTPUT_DIR) != ""
    if args.eval_only:
        if args.resume and not has_checkpoint:
            raise UserError(f"--eval-only --resume evaluates the last checkpoint, but {cfg.OUTPUT_DIR} has none")
        if not args.resume and not cfg.MODEL.WEIGHTS:
            raise UserError("--eval-only needs MODEL.WEIGHTS, a checkpoint to evaluate")
    elif has_checkpoint and not args.resume:
        raise UserError(
            f"{cfg.OUTPUT_DIR} has checkpoints of an earlier run: continue it with --resume, or set another OUTPUT_DIR"
        )
    elif comm.is_main_process():
        lock_folder(Path(cfg.OUTPUT_DIR))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command line; None takes that of the process."""
    args = parse_args(argv)
    launch(
        run,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


if __name__ == "__main__":
    run_program(main)
