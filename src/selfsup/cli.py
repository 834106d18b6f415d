"""The command line: every verb teaches by example, answers at once, and ends with the next step."""

import argparse
import os
import sys
from collections.abc import Sequence

from selfsup.commands import (
    exchanging,
    few_labels,
    learning,
    looking,
    measuring,
    planning,
    preparing,
    prompting,
    searching,
    smaller,
    using,
)
from selfsup.commands.options import Parser
from selfsup.cores import settle_threads
from selfsup.errors import SelfsupError

GROUPS = (
    *(learning, measuring, using, searching, prompting, looking),
    *(few_labels, smaller, planning, preparing, exchanging),
)
EPILOG = """\
a first run:
  selfsup list recipes
  selfsup pretrain bert-tiny-english --data texts/ --out runs/mine
  selfsup compare runs/mine --task classification --data reviews.csv
  selfsup report runs/mine

exit codes: 0 done, 2 wrong use, 3 bad data, 4 diverged, 5 storage, 130/143 stopped and resumable
"""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = Parser(
        prog="selfsup",
        description="Pre-train on your own unlabeled data, adapt with few labels, "
        "and see with evidence what the pre-training was worth.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    parsers = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=Parser)
    for group in GROUPS:
        group.add(parsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; gives the exit code of errors.py."""
    settle_threads(os.environ)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # torch's own notes, once for every process
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.version:
        import importlib.metadata

        print(importlib.metadata.version("selfsup"))
        return 0
    if options.verb is None:
        parser.print_help()
        return 0
    try:
        options.run(options)
    except SelfsupError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `selfsup predict ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
