"""The verb `prompt`: in-context learning with a model that writes.

Nothing heavy is imported before it runs.
"""

import argparse
from typing import Any

from selfsup.commands.options import column_options, columns_of, verb
from selfsup.errors import ConfigError


def add(parsers: Any) -> None:
    """Adds these verbs to the command line."""
    p = verb(
        parsers,
        "prompt",
        prompt,
        "let a model that writes label items after a few examples in its prompt, or none",
        "  selfsup prompt runs/gpt 'a wonderful film' --template sentiment\n"
        "  selfsup prompt runs/gpt --template sentiment --data train.csv --test test.csv \\\n"
        "      --shots 0 1 4 16 --seeds 0 1 2 --calibrate\n"
        "  selfsup prompt runs/gpt 'Two men sleep. | The men are awake.' --template nli\n"
        "  selfsup prompt runs/many-tasks --template nli --test rte.tsv   (no demonstrations)",
    )
    p.add_argument("model", help="a causal_language, encoder-decoder or generation run")
    p.add_argument("items", nargs="*", help="texts, or 'one | other' for a template of pairs")
    p.add_argument("--template", required=True, help="a name (selfsup list templates) or a file")
    p.add_argument("--data", help="labelled file that demonstrations are drawn from")
    p.add_argument("--test", help="labelled file that is scored (default: split off --data)")
    p.add_argument(
        "--shots", nargs="+", type=int, metavar="N", help="demonstrations (0 1 4 16; items: 4)"
    )
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds (0 1 2)")
    p.add_argument("--balanced", action="store_true", help="draw equally many of each class")
    p.add_argument("--calibrate", action="store_true", help="contextual calibration")
    p.add_argument(
        "--normalise", default="none", help="score of a label word: none, length, unconditional"
    )
    p.add_argument("--limit", type=int, metavar="N", help="score so many test items only")
    p.add_argument("--max-length", type=int, help="longest prompt in tokens")
    p.add_argument("--reasoning-tokens", type=int, default=64, help="longest reasoning (64)")
    p.add_argument("--temperature", type=float, default=0.0, help="of reasoning; 0: no chance (0)")
    p.add_argument("--record", metavar="NAME", help="write the result to docs/results/NAME.json")
    column_options(p)


def prompt(options: argparse.Namespace) -> None:
    """Measures in-context learning and prints a table; or labels the items that are given."""
    from selfsup import api, results

    settings = {
        name: getattr(options, name)
        for name in ("normalise", "balanced", "limit", "max_length", "temperature")
    }
    settings |= {"calibrate": options.calibrate, "reasoning_tokens": options.reasoning_tokens}
    settings |= {"seeds": tuple(options.seeds)}
    if options.shots is not None:
        settings["shots"] = tuple(options.shots)
    if options.items:
        _answer_prompts(options, settings)
        return
    result = api.prompt(
        options.model,
        options.template,
        data=options.data,
        test=options.test,
        columns=columns_of(options),
        **settings,
    )
    if options.record:
        results.record_prompt(options.record, result)
    _print_prompting(result)


def _answer_prompts(options: argparse.Namespace, settings: dict[str, Any]) -> None:
    """A line per item: the label word, the probability of every word, the item."""
    from selfsup import api
    from selfsup.data import templates
    from selfsup.evaluation import demonstrations, in_context

    if options.test or options.record:
        raise ConfigError("items are answered, not scored: leave --test and --record out")
    chosen = in_context.Settings(**{"shots": (4 if options.data else 0,), **settings})
    template, shots, seed = templates.load(options.template), chosen.shots[0], chosen.seeds[0]
    if len(chosen.shots) > 1 or (shots and not options.data):
        raise ConfigError("items are answered after one number of --shots, drawn from --data")
    items: list[Any] = options.items
    if template.paired:
        items = [tuple(item.split(" | ", 1)) if " | " in item else item for item in items]
    shown = []
    if shots:
        pool = demonstrations.read_examples(options.data, template, columns_of(options), True)
        shown = demonstrations.draw(pool, shots, seed, chosen.balanced)
    answers = in_context.answer(api.load(options.model), template, shown, items, chosen, seed)
    found = answers.plain if answers.calibrated is None else answers.calibrated
    for item, shares in zip(options.items, found, strict=True):
        words = " ".join(f"{w} {p:.4f}" for w, p in zip(template.words, shares, strict=True))
        print(f"{template.words[shares.argmax()]}\t{words}\t{item}")


def _print_prompting(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from selfsup.reporting.evidence import interval

    names = {"accuracy": "accuracy", "one_answer": "most given answer"}
    names |= {"calibrated_accuracy": "calibrated", "calibrated_one_answer": "most given answer"}
    measured = [name for name in names if name in next(iter(result["scores"].values()))]
    title = f"{result['test_size']} items of {result['template']}, mean and 95% interval"
    table = Table("shots", *(names[name] for name in measured), "majority", title=title)
    for shots, scores in result["scores"].items():
        cells = [interval(scores[name]) for name in measured]
        shown = [
            f"{mean:.3f}" + (f" ±{half:.3f}" if half is not None else "") for mean, half in cells
        ]
        table.add_row(shots, *shown, f"{result['majority']:.3f}")
    Console().print(table)
