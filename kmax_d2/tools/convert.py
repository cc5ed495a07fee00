"""Writes weights of any published format as a Detectron2 checkpoint, with the names of this project.

`python -m kmax_d2.tools.convert IN OUT --config-file NAME [OPTION VALUE ...]`
"""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path

import torch
from detectron2.modeling import build_model
from detectron2.utils.logger import setup_logger

from ..checkpoint import KMaXCheckpointer
from ..engine.setup import choose_device, load_config, prepare_datasets
from ..errors import UserError, exit_on_user_error


def write_checkpoint(weights: dict[str, torch.Tensor], file: Path) -> None:
    """Writes a checkpoint as `file`'s suffix says, .pth or .pkl, under another name first."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(unfinished, "wb") as stream:
                if file.suffix == ".pth":
                    torch.save({"model": weights}, stream)
                else:
                    arrays = {name: tensor.numpy() for name, tensor in weights.items()}
                    pickle.dump({"model": arrays, "__author__": "kmax_d2"}, stream, protocol=pickle.HIGHEST_PROTOCOL)
            os.replace(unfinished, file)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from error


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("input", metavar="IN", help="whatever MODEL.WEIGHTS takes: a file, an address, a prefix")
    parser.add_argument("output", metavar="OUT", type=Path, help="the checkpoint to write, .pth or .pkl")
    parser.add_argument(
        "--config-file",
        metavar="NAME",
        required=True,
        help="config of the model, which says what fits and the order of classes, such as coco/r50",
    )
    parser.add_argument("opts", nargs="*", metavar="OPTION VALUE", help="options of the config")
    args = parser.parse_intermixed_args(arguments)
    if args.output.suffix not in (".pth", ".pkl"):
        raise UserError(f"the output's name ends in .pth or .pkl, not as {args.output} does")

    setup_logger(name="fvcore")
    cfg = load_config(args.config_file, [*args.opts, "MODEL.DEVICE", "cpu"])
    prepare_datasets(cfg)
    choose_device(cfg)
    model = build_model(cfg)
    checkpointer = KMaXCheckpointer(model)
    checkpointer.load(args.input)
    state_dict = model.state_dict()
    # The model's own tensors, not those that were read, which may be views of a whole file.
    weights = {name: state_dict[name].contiguous() for name in sorted(checkpointer.taken)}
    write_checkpoint(weights, args.output)
    print(f"{len(weights)} weights written to {args.output}")


if __name__ == "__main__":
    exit_on_user_error(main)
