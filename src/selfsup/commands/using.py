"""The verbs that use a run: `fill`, `generate`, `predict`.

Nothing heavy is imported before one of them runs.
"""

import argparse
from pathlib import Path
from typing import Any

from selfsup.commands.options import set_option, settings_of, sources_of, verb
from selfsup.errors import ConfigError


def add(parsers: Any) -> None:
    """Adds these verbs to the command line."""
    p = verb(
        parsers,
        "fill",
        fill,
        "fill the blanks of a text",
        "  selfsup fill runs/mine 'He closed the [MASK] and went home.'",
    )
    p.add_argument("model", help="a masked_language run")
    p.add_argument("text", help="a text with one or more [MASK]")
    p.add_argument("--top", type=int, default=5, help="candidates per blank (5)")

    p = verb(
        parsers,
        "generate",
        generate,
        "write on from a beginning",
        "  selfsup generate runs/gpt --prompt 'It was a dark' --tokens 80 --temperature 0.8",
    )
    p.add_argument("model", help="a causal_language run")
    p.add_argument("--prompt", default="", help="the beginning")
    p.add_argument("--tokens", type=int, default=100, help="most tokens to add (100)")
    p.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest token (1.0)")
    p.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest; 0: all")
    p.add_argument("--top-p", type=float, default=1.0, help="draw from this share of probability")
    p.add_argument("--seed", type=int, default=0, help="another seed, another text")

    p = verb(
        parsers,
        "predict",
        predict,
        "label new items with a fine-tuned run, or find unusual ones with an autoencoder",
        "  selfsup predict runs/reviews 'A wonderful film.'\n"
        "  selfsup predict runs/reviews --data new.csv > labels.tsv\n"
        "  selfsup predict runs/pairs --data new.csv --text question --text-b answer\n"
        "  selfsup predict runs/rows --data new.csv         anomaly or normal, and why",
    )
    p.add_argument("model", help="a fine-tuned run, or an autoencoder of rows or pictures")
    p.add_argument("items", nargs="*", help="texts, or paths of pictures or sounds")
    p.add_argument("--data", nargs="+", help="files of the kind that the run was trained on")
    p.add_argument("--text", metavar="COLUMN", help="column of csv, jsonl, parquet (text, image)")
    p.add_argument("--text-b", metavar="COLUMN", help="the second text, for a model of pairs")
    set_option(p, "task.exits.rule=patience task.exits.patience=2 task.num_beams=4")


def fill(options: argparse.Namespace) -> None:
    """Prints candidates for every blank."""
    from selfsup import api

    blanks = api.load(options.model).fill(options.text, options.top)
    for number, candidates in enumerate(blanks, 1):
        for word, probability in candidates:
            print(f"{number}\t{word}\t{probability:.4f}")


def generate(options: argparse.Namespace) -> None:
    """Prints a text that goes on from the prompt."""
    from selfsup import api

    text = api.load(options.model).generate(
        options.prompt,
        options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    print(text)


def predict(options: argparse.Namespace) -> None:
    """Prints a label per item, or whether it is unusual."""
    from selfsup import api

    if not options.items and not options.data:
        raise ConfigError("nothing to predict: give items, or --data FILE")
    model = api.load(options.model, settings=settings_of(options))
    items: list[tuple[str, Any]] = [(item, item) for item in options.items]
    if options.data and options.text_b:
        items += [(" | ".join(pair), pair) for pair in _pairs(options)]
    elif options.data:
        items += _items(options, model)
    names, values = [name for name, _ in items], [item for _, item in items]
    if "anomaly" in model.values:
        from selfsup.evaluation.anomaly import line

        for name, found in zip(names, model.anomalies(values), strict=True):
            print(line(name, found))
        return
    task = model.values.get("task", {}).get("name")
    if task == "classification":
        for name, share in zip(names, model.predict_proba(values), strict=True):
            print(f"{model.names[share.argmax()]}\t{share.max():.4f}\t{name}")
        return
    for name, answer in zip(names, model.predict(values), strict=True):
        if task == "tagging":
            print(" ".join(f"{w}/{t}" for w, t in zip(name.split(), answer, strict=True)))
        elif isinstance(answer, str):
            print(f"{' '.join(answer.split())}\t{' '.join(name.split())}")
        else:
            print(f"{answer:.6g}\t{name}")


def _items(options: argparse.Namespace, model: Any) -> list[tuple[str, Any]]:
    """(what people call it, the item) for everything in --data, read as the model's data are."""
    from selfsup import registry

    data_module = registry.module_of(registry.DATA, "data", model.values["data"]["name"])
    found = data_module.read_items(sources_of(options), options.text, model.preprocessor)
    return [(item if isinstance(item, str) else name, item) for name, item in found]


def _pairs(options: argparse.Namespace) -> list[tuple[str, str]]:
    from selfsup.data.label_files import find_column, table

    pairs = []
    for path in map(Path, options.data):
        columns, records = table(path)
        a = find_column(path, columns, "text", options.text)
        b = find_column(path, columns, "text_b", options.text_b)
        pairs += [(str(record.cells[a]), str(record.cells[b])) for record in records]
    return pairs
