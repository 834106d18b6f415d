"""The verbs that make another run of a run: `distill`, `prune`, `merge`.

Nothing heavy is imported before one of them runs.
"""

import argparse
from typing import Any

from selfsup import console
from selfsup.commands.options import (
    column_options,
    columns_of,
    say_next_of_task,
    set_option,
    settings_of,
    verb,
)
from selfsup.errors import ConfigError


def add(parsers: Any) -> None:
    """Adds these verbs to the command line."""
    p = verb(
        parsers,
        "distill",
        distill,
        "make a smaller run that answers as a fine-tuned one does",
        "  selfsup distill runs/reviews --data reviews.csv --out runs/half\n"
        "  selfsup distill runs/reviews --data reviews.csv --unlabelled texts/ --layers 2 \\\n"
        "      --out runs/small --set distillation.temperature=4 training.steps=2000\n"
        "  selfsup distill runs/tags --student runs/mini --data train.conllu --out runs/mini-tags",
    )
    p.add_argument("model", help="the teacher: a run fine-tuned for classes, tags or numbers")
    p.add_argument("--data", required=True, help="labelled file with the teacher's labels")
    p.add_argument(
        "--unlabelled", nargs="+", metavar="FILE", help="more items, for which the teacher speaks"
    )
    p.add_argument("--valid", help="labelled file that is followed while training")
    p.add_argument("--out", required=True, help="the run folder to make")
    p.add_argument(
        "--layers", type=int, help="layers of the student, taken from the teacher (half of them)"
    )
    p.add_argument("--fresh", action="store_true", help="begin with random weights instead")
    p.add_argument("--student", metavar="RUN", help="a smaller run with the same tokenizer")
    p.add_argument("--max-length", type=int, help="longest item (the teacher's)")
    p.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in --out"
    )
    set_option(p, "distillation.alpha=0.5 distillation.hidden_weight=1 training.lr=1e-3")
    column_options(p)

    p = verb(
        parsers,
        "prune",
        prune,
        "make a smaller and faster run of a run",
        "  selfsup prune runs/tags --heads 0.3 --data train.conllu --out runs/small\n"
        "  selfsup prune runs/mine --top-layers 2 --out runs/short\n"
        "  selfsup prune runs/tags --movement 0.85 --data train.conllu --out runs/sparse \\\n"
        "      --set training.steps=500",
    )
    _prune_options(p)
    set_option(p, "training.steps=500 pruning.cooldown=0.2 (while it trains)")
    column_options(p)

    p = verb(
        parsers,
        "merge",
        merge,
        "make a run that was tuned over a base one that needs no base",
        "  selfsup merge runs/mood-lora --out runs/mood",
    )
    p.add_argument("model", help="a run tuned over a base: lora, adapter, prefix, ...")
    p.add_argument("--out", required=True, help="the run folder to make")


def distill(options: argparse.Namespace) -> None:
    """Trains a student; prints the run folder."""
    from selfsup.verbs import distilling

    run = distilling.distill(
        options.model,
        options.data,
        options.out,
        student=options.student,
        layers=options.layers,
        fresh=options.fresh,
        unlabelled=options.unlabelled,
        valid=options.valid,
        settings=settings_of(options),
        columns=columns_of(options),
        max_length=options.max_length,
        resume=options.resume,
    )
    print(run)
    say_next_of_task(run)


def _prune_options(p: argparse.ArgumentParser) -> None:
    """What the command line takes, beside `--set` and the columns."""
    p.add_argument("model", help="a fine-tuned run; for layers and weights also a pre-trained one")
    p.add_argument("--out", required=True, help="the run folder to make")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--heads", type=float, metavar="SHARE", help="least important heads")
    what.add_argument("--units", type=float, metavar="SHARE", help="least important inner units")
    what.add_argument("--layers", metavar="N,N", help="these layers, from 0")
    what.add_argument("--top-layers", type=int, metavar="COUNT", help="the last layers")
    what.add_argument("--alternate-layers", type=int, metavar="COUNT", help="every other layer")
    what.add_argument("--weights", type=float, metavar="SHARE", help="smallest weights: no speed")
    what.add_argument("--gradual", type=float, metavar="SHARE", help="the same while it trains")
    what.add_argument("--movement", type=float, metavar="SHARE", help="weights that move to zero")
    p.add_argument("--data", help="labelled file that judges heads and units, and trains")
    p.add_argument("--test", help="labelled file that is scored (default: split off --data)")


def prune(options: argparse.Namespace) -> None:
    """Writes the pruned run; prints what went, and the numbers before and after."""
    from selfsup.verbs import pruning

    kind = next(kind for kind in pruning.KINDS if getattr(options, kind) is not None)
    amount: Any = getattr(options, kind)
    if kind == "layers":
        try:
            amount = [int(number) for number in amount.split(",")]
        except ValueError:
            raise ConfigError(f"--layers {amount}: expected numbers, such as 2,3") from None
    result = pruning.prune(
        options.model,
        options.out,
        kind,
        amount,
        data=options.data,
        test=options.test,
        columns=columns_of(options),
        settings=settings_of(options),
    )
    _print_pruned(result)
    print(options.out)
    console.say(f"next: selfsup report {options.out}")


def _print_pruned(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    removed = result.get("removed")
    if isinstance(removed, dict):
        for layer, parts in removed.items():
            shown = ", ".join(map(str, parts[:20])) + ", ..." * (len(parts) > 20)
            print(f"layer {layer} loses {len(parts)} {result['kind']}: {shown}")
    elif isinstance(removed, list):
        print(f"layers {', '.join(map(str, removed))} are gone")
    table = Table("what", "before", "after")
    rows = [("parameters", "parameters", ",d"), ("bytes", "bytes", ",d")]
    rows += [("bytes after zstd", "compressed_bytes", ",d")]
    rows += [("seconds per batch", "seconds_per_batch", ".4f")]
    rows += [(result["metric"], "score", ".4f")] if "score" in result else []
    for name, key, form in rows:
        pair = result[key]
        table.add_row(name, format(pair["before"], form), format(pair["after"], form))
    Console().print(table)
    if "zeros" in result:
        print(
            f"{result['zeros']:.1%} of the blocks' weights are zeros: the file compresses, the "
            "matrices are as large and as slow as before"
        )
    if "curve" in result:
        scored = "score" in result["curve"][0]
        curve = Table("removed", "parameters", "speed-up", *(["score"] * scored))
        for row in result["curve"]:
            cells = [f"{row['share']:.0%}", f"{row['parameters']:,}", f"{row['speedup']:.2f}"]
            curve.add_row(*cells, *([f"{row['score']:.4f}"] if scored else []))
        Console().print(curve)


def merge(options: argparse.Namespace) -> None:
    """Writes the whole run; prints its folder, and says whether anything is still added."""
    from selfsup.verbs import merging

    merging.merge(options.model, options.out)
    print(options.out)
    console.say(f"next: selfsup evaluate {options.out} --data TEST")
