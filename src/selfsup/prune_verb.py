"""The verb `prune`: a smaller run of a run, and what that brought and cost.

Nothing heavy is imported before it runs.
"""

import argparse
from typing import Any

from selfsup import console
from selfsup.errors import ConfigError


def add_options(p: argparse.ArgumentParser) -> None:
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
    from selfsup.config import parse_setting
    from selfsup.pruned_run import KINDS, prune

    kind = next(kind for kind in KINDS if getattr(options, kind) is not None)
    amount: Any = getattr(options, kind)
    if kind == "layers":
        try:
            amount = [int(number) for number in amount.split(",")]
        except ValueError:
            raise ConfigError(f"--layers {amount}: expected numbers, such as 2,3") from None
    given = {"text": options.text, "text_b": options.text_b, "label": options.label}
    result = prune(
        options.model,
        options.out,
        kind,
        amount,
        data=options.data,
        test=options.test,
        columns={name: column for name, column in given.items() if column is not None},
        settings=dict(map(parse_setting, options.set)),
    )
    _print(result)
    print(options.out)
    console.say(f"next: selfsup report {options.out}")


def _print(result: dict[str, Any]) -> None:
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
