"""Writes published weights of any format as a Detectron2 checkpoint, with the entry names of this project.

python -m kmax_d2.tools.convert IN OUT --config-file NAME [--half] [NAME VALUE ...]
"""

from collections.abc import Sequence
from pathlib import Path

from ..command_line import ConfigParser, run_program

PARSER = ConfigParser(__doc__, overwrite=True)
PARSER.add_argument("input", metavar="IN", help="anything MODEL.WEIGHTS accepts: a file, a URL, a prefix")
PARSER.add_argument("output", metavar="OUT", type=Path, help="the checkpoint to write, .pth or .pkl")
PARSER.add_argument("--half", action="store_true", help="in half precision, which halves the file")

PARSER.parse_if_main(__name__)

import pickle

import torch
from detectron2.modeling import build_model
from detectron2.utils.logger import setup_logger

from ..checkpoint import KMaXCheckpointer
from ..checkpoint.origin import describe_model
from ..engine import ready_config
from ..errors import UserError
from ..files import MARK, require_own, whole_file


def write_checkpoint(weights: dict[str, torch.Tensor], file: Path, origin: dict) -> None:
    """Writes a checkpoint in the format of `file`'s suffix, .pth or .pkl; the latter has no `origin`.

    Raises UserError if that is impossible.
    """
    with whole_file(file) as unfinished, open(unfinished, "wb") as stream:
        if file.suffix == ".pth":
            torch.save({"__author__": MARK, "model": weights} | origin, stream)
        else:
            arrays = {name: tensor.numpy() for name, tensor in weights.items()}
            pickle.dump({"__author__": MARK, "model": arrays}, stream, protocol=pickle.HIGHEST_PROTOCOL)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command line; None takes that of the process."""
    args = PARSER.parse(argv)
    if args.output.suffix not in (".pth", ".pkl"):
        raise UserError(f"the name of the output must end in .pth or .pkl, unlike {args.output}")
    if args.output.resolve() == Path(args.input).resolve():
        raise UserError(f"{args.output} is the input: choose another name for the output")
    require_own([args.output], args.overwrite)
    for name in ("fvcore", "kmax_d2"):
        setup_logger(name=name)
    cfg = ready_config(args.config_file, args.opts, ("MODEL.DEVICE", "cpu"))
    model = build_model(cfg)
    checkpointer = KMaXCheckpointer(model)
    checkpointer.load(args.input)
    state_dict = model.state_dict()
    # The model's own tensors: those read from the file may be views of a larger storage.
    weights = {name: state_dict[name].contiguous() for name in sorted(checkpointer.taken)}
    if args.half:
        weights = {name: each.half() if each.is_floating_point() else each for name, each in weights.items()}
    write_checkpoint(weights, args.output, describe_model(cfg))
    print(f"{len(weights)} weights written to {args.output}")


if __name__ == "__main__":
    run_program(main)
