"""The command-line grammar that the demo and the tools share.

Programs parse first and import PyTorch afterwards, so this module imports nothing that takes long.
"""

import argparse
import logging
import signal
import sys
from collections.abc import Callable, Sequence

from .errors import UserError, report_errors


def whole(option: str, low: int, high: int = 10**6) -> Callable[[str], int]:
    """Returns the type of an option that is a whole number from `low` to `high`; it raises UserError for others."""

    def number(text: str) -> int:
        if not low <= int(text) <= high:
            raise UserError(f"{option} is {text}, but must be a whole number from {low} to {high}")
        return int(text)

    return number


class ConfigParser(argparse.ArgumentParser):
    """Parses a config, a checkpoint, and config options; a program adds its own arguments.

    Args:
        doc: the program's docstring, shown by ``--help``.
        config_file: whether ``--config-file`` is required; None leaves it out.
        weights, data, overwrite: whether there is ``--weights``, ``--test-data``, ``--overwrite``.
        options: "opts" for NAME VALUE pairs anywhere after the program's own positional arguments; "--opts" if they
            must follow that flag, because the program takes a list of something else.
    """

    def __init__(
        self,
        doc: str,
        *,
        config_file: bool | None = True,
        weights: bool = False,
        data: bool = False,
        overwrite: bool = False,
        options: str | None = "opts",
    ):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        self._options = options
        if config_file is not None:
            text = "config file or name, such as coco/r50"
            self.add_argument("--config-file", required=config_file, metavar="FILE", help=text)
        if weights:
            self.add_argument("--weights", metavar="FILE", help="checkpoint; short for the option MODEL.WEIGHTS")
        if data:
            text = "your own data in COCO panoptic format; short for the option DATASETS.OWN_TEST"
            self.add_argument("--test-data", nargs=3, metavar=("IMAGES", "PNGS", "JSON"), help=text)
        if overwrite:
            text = "write over files that kmax_d2 did not make"
            self.add_argument("--overwrite", action="store_true", help=text)

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parses arguments, None for the process's; ``--weights`` and ``--test-data`` become options in "opts"."""
        if self._options:  # now that the program has added its positional arguments, which come before
            text = "config options to change"
            self.add_argument(self._options, nargs="*", default=[], metavar="NAME VALUE", help=text)
            self._options = None
        if argv is None:
            report_errors()
        args = self.parse_intermixed_args(argv)
        if getattr(args, "weights", None):
            args.opts = ["MODEL.WEIGHTS", args.weights, *args.opts]
        if getattr(args, "test_data", None):
            args.opts = ["DATASETS.OWN_TEST", args.test_data, *args.opts]
        return args

    def parse_if_main(self, name: str) -> None:
        """Parses the process's arguments if `name` is "__main__": --help and mistakes need no slow imports."""
        if name == "__main__":
            self.parse()


def run_program(main: Callable[[], object]) -> None:
    """Runs a program's main function with freed memory kept; errors of the user's are one line."""
    report_errors()
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # removes what is not complete
    logging.raiseExceptions = False  # a log that fails, on a full disk for example, is not worth its tracebacks
    from .speed import keep_freed_memory  # imports PyTorch

    keep_freed_memory()
    main()
