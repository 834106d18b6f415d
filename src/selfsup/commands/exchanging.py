"""The verbs `import` and `export`: checkpoints of other libraries.

Nothing heavy is imported before one of them runs.
"""

import argparse
from typing import Any

from selfsup.commands.options import say_next, say_next_of_task, verb


def add(parsers: Any) -> None:
    """Adds these verbs to the command line."""
    p = verb(
        parsers,
        "import",
        import_,
        "make a run of a published checkpoint",
        "  selfsup import bert-base-uncased --out runs/bert\n"
        "  selfsup import checkpoints/t5-small --out runs/t5\n"
        "  selfsup import adapters/mood --base runs/bert --out runs/mood    an adapter of PEFT",
    )
    p.add_argument(
        "source", help="a folder of transformers (safetensors), or a name on the Hugging Face Hub"
    )
    p.add_argument("--base", metavar="RUN", help="of an adapter of PEFT: the model it is for")
    p.add_argument("--out", required=True, help="the run folder to make")

    p = verb(
        parsers,
        "export",
        export,
        "write a run as a checkpoint of another library",
        "  selfsup export runs/mine --to transformers --out checkpoints/mine\n"
        "  selfsup export runs/mood-lora --to peft --out adapters/mood",
    )
    p.add_argument("model", help="a run folder with a transformer of text")
    p.add_argument("--to", default="transformers", help="transformers (default) or peft")
    p.add_argument("--out", required=True, help="the folder to make")


def import_(options: argparse.Namespace) -> None:
    """Makes a run of a checkpoint or an adapter; prints the run folder."""
    from selfsup import api
    from selfsup.config import read_toml

    run = api.import_(options.source, options.out, options.base)
    print(run)
    if "task" in read_toml(run / "run.toml"):
        say_next_of_task(run)
    else:
        say_next(run)


def export(options: argparse.Namespace) -> None:
    """Writes a run for another library; prints the folder."""
    from selfsup import api

    print(api.export(options.model, options.out, options.to))
