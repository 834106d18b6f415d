"""What the parsers of several verbs share."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selfsup import console


class Parser(argparse.ArgumentParser):
    """argparse, with one line of error, a pointer to the help, and our exit code."""

    def error(self, message: str) -> Any:
        """Ends the program."""
        self.exit(2, f"error: {message}\nsee: {self.prog} --help\n")


def verb(
    parsers: Any, name: str, run: Callable[[argparse.Namespace], None], summary: str, example: str
) -> argparse.ArgumentParser:
    """A new parser, whose help ends with examples."""
    parser = parsers.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def set_option(parser: argparse.ArgumentParser, example: str) -> None:
    """`--set`, which `settings_of` reads."""
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        action="extend",
        metavar="KEY=VALUE",
        help=f"change the configuration: {example}",
    )


def column_options(parser: argparse.ArgumentParser) -> None:
    """The columns of labelled files, which `columns_of` reads."""
    group = parser.add_argument_group("columns, where they do not have their usual names")
    group.add_argument("--text", metavar="COLUMN", help="the text, picture or path")
    group.add_argument("--text-b", metavar="COLUMN", help="the second text of a pair")
    group.add_argument("--label", metavar="COLUMN", help="the label; for CoNLL-U also xpos, deprel")


def workers_options(parser: argparse.ArgumentParser, jobs: int) -> None:
    """Who works, which `workers_of` reads; `jobs` is the default."""
    parser.add_argument(
        "--jobs",
        type=int,
        default=jobs,
        help=f"processes side by side; 0: one for each core ({jobs})",
    )
    parser.add_argument(
        "--engine",
        default="local",
        choices=["local", "ray"],
        help="this machine, or a Ray cluster that shares its files (local)",
    )


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What `--set` says, by dotted key."""
    from selfsup.config import parse_setting

    return dict(parse_setting(text) for text in options.set)


def workers_of(options: argparse.Namespace) -> dict[str, Any]:
    """`jobs` and `engine`."""
    from selfsup.cores import cores

    return {"jobs": options.jobs or cores(), "engine": options.engine}


def columns_of(options: argparse.Namespace) -> dict[str, str]:
    """The columns that were named."""
    given = {"text": options.text, "text_b": options.text_b, "label": options.label}
    return {name: column for name, column in given.items() if column is not None}


def sources_of(options: argparse.Namespace) -> str | list[str]:
    """What `--data` names: one place, or a list."""
    return options.data[0] if len(options.data) == 1 else options.data


def say_next(run: str | Path) -> None:
    """The next steps to try after pre-training, for people."""
    from selfsup.config import read_toml

    console.say(f"next: selfsup report {run}")
    if "anomaly" in read_toml(Path(run) / "run.toml"):
        console.say(f"      selfsup predict {run} --data NEW")
        return
    console.say(f"      selfsup compare {run} --task classification --data LABELLED.csv")


def say_next_of_task(run: str | Path) -> None:
    """The next steps after fine-tuning."""
    from selfsup.config import read_toml

    kind = read_toml(Path(run) / "run.toml")["data"]["name"]
    item = {"text": "'a text'", "image": "PICTURE", "audio": "SOUND"}.get(kind, "--data NEW")
    console.say(f"next: selfsup evaluate {run} --data TEST   or   selfsup predict {run} {item}")
