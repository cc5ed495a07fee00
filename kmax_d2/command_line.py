"""The command-line grammar that the demo and the tools share.

Programs parse first and import PyTorch afterwards, so this module imports nothing that takes long.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from .errors import exit_on_user_error


def config_parser(doc: str, *, config_file: bool | None = True, weights: bool = False) -> argparse.ArgumentParser:
    """Returns a parser for a config and checkpoint, to which a program adds its own arguments.

    Args:
        doc: the program's docstring, shown by ``--help``.
        config_file: whether ``--config-file`` is required; None leaves it out.
        weights: whether there is ``--weights``.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if config_file is not None:
        help_text = "config file or name, such as coco/r50"
        parser.add_argument("--config-file", required=config_file, metavar="FILE", help=help_text)
    if weights:
        parser.add_argument("--weights", metavar="FILE", help="checkpoint; short for the option MODEL.WEIGHTS")
    return parser


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None, options: str = "opts"
) -> argparse.Namespace:
    """Parses a command line with config options, which ``--weights`` becomes one of.

    Args:
        parser: from :func:`config_parser`.
        argv: the arguments; None takes those of the process.
        options: "opts" for NAME VALUE pairs anywhere after the program's own positional arguments; "--opts" if they
            must follow that flag, because the program takes a list of something else.
    """
    parser.add_argument(options, nargs="*", default=[], metavar="NAME VALUE", help="config options to change")
    args = parser.parse_intermixed_args(argv)
    if getattr(args, "weights", None):
        args.opts = ["MODEL.WEIGHTS", args.weights, *args.opts]
    return args


def run_program(main: Callable[[], object]) -> None:
    """Runs a program's main function with freed memory kept; a UserError ends it with one line and status 1."""
    from .speed import keep_freed_memory  # imports PyTorch

    keep_freed_memory()
    exit_on_user_error(main)
