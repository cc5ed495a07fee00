#!/usr/bin/env python
"""Trains and evaluates kMaX-DeepLab with Detectron2's own arguments; `--help` lists them."""

from __future__ import annotations

import argparse

from detectron2.engine import default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from kmax_d2.checkpoint import KMaXCheckpointer
from kmax_d2.engine import Trainer, argument_parser, launch, setup
from kmax_d2.speed import inference_model
from kmax_d2.errors import UserError, exit_on_user_error


def run(args: argparse.Namespace) -> dict:
    """Trains, or evaluates with `--eval-only`, in one process."""
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


def main() -> None:
    parser = argument_parser()
    parser.add_argument(
        "--save-predictions",
        metavar="DIR",
        help="write what is predicted in evaluation there, in the formats of COCO's and Cityscapes' servers",
    )
    args = parser.parse_args()
    if args.save_predictions:
        args.opts += ["MODEL.KMAX.TEST.SAVE_PREDICTIONS", args.save_predictions]
    launch(
        run,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


if __name__ == "__main__":
    exit_on_user_error(main)
