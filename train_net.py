#!/usr/bin/env python
"""Trains and evaluates kMaX-DeepLab with Detectron2's arguments; `--help` lists them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from detectron2.engine import default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from kmax_d2.checkpoint import KMaXCheckpointer
from kmax_d2.command_line import run_program
from kmax_d2.engine import Trainer, launch, setup
from kmax_d2.engine.setup import parse_args
from kmax_d2.errors import UserError
from kmax_d2.speed import inference_model


def run(args: argparse.Namespace) -> dict:
    """Trains, or evaluates with `--eval-only`, in one process. Returns the last results by task."""
    setup_logger(distributed_rank=comm.get_rank(), name="kmax_d2")
    cfg = setup(args)
    default_setup(cfg, args)
    if args.eval_only:
        if not cfg.MODEL.WEIGHTS and not args.resume:
            raise UserError("--eval-only needs MODEL.WEIGHTS, a checkpoint to evaluate")
        model = Trainer.build_model(cfg)
        checkpointer = KMaXCheckpointer(model, save_dir=cfg.OUTPUT_DIR, complete=True)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, inference_model(model, cfg))
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


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
