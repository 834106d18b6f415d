"""The verbs that use a run: `fill`, `generate`, `words`, `predict`.

Nothing heavy is imported before one of them runs.
"""

import argparse
from pathlib import Path
from typing import Any

from selfsup.commands.options import set_option, settings_of, sources_of, verb
from selfsup.errors import ConfigError, DataError


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
        "  selfsup generate runs/gpt --prompt 'It was a dark' --tokens 80 --temperature 0.8\n"
        "  selfsup generate runs/t5 --prompt 'translate English to German: Hello.' --temperature 0",
    )
    p.add_argument("model", help="a causal_language, gpt_bert, denoising or generation run")
    p.add_argument("--prompt", default="", help="the beginning; a source, where the model answers")
    p.add_argument("--tokens", type=int, default=100, help="most tokens to add (100)")
    p.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest token (1.0)")
    p.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest; 0: all")
    p.add_argument("--top-p", type=float, default=1.0, help="draw from this share of probability")
    p.add_argument("--seed", type=int, default=0, help="another seed, another text")

    p = verb(
        parsers,
        "words",
        words,
        "find the words of the nearest vectors, or what is to one word as two others are",
        "  selfsup words runs/vectors king queen\n"
        "  selfsup words runs/vectors --analogy man king woman",
    )
    p.add_argument("model", help="a word2vec run, or another with a table of tokens")
    p.add_argument("words", nargs="*", help="words whose neighbours are shown")
    p.add_argument("--analogy", nargs=3, metavar="WORD", help="A B C: what is to C as B is to A")
    p.add_argument("--top", type=int, default=10, help="words to show (10)")

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


def words(options: argparse.Namespace) -> None:
    """Prints (word asked for, word found, cosine)."""
    from selfsup import api
    from selfsup.evaluation.words import analogy, nearest_words

    if not options.words and not options.analogy:
        raise ConfigError("nothing to look up: give words, or --analogy A B C")
    model = api.load(options.model)
    found = dict(zip(options.words, nearest_words(model, options.words, options.top), strict=True))
    if options.analogy:
        a, b, c = options.analogy
        found[f"{b} - {a} + {c}"] = analogy(model, a, b, c, options.top)
    for asked, near in found.items():
        for word, cosine in near:
            print(f"{asked}\t{word}\t{cosine:.4f}")


def predict(options: argparse.Namespace) -> None:
    """Prints a label per item, or whether it is unusual."""
    from selfsup import api

    if not options.items and not options.data:
        raise ConfigError("nothing to predict: give items, or --data FILE")
    model = api.load(options.model, settings=settings_of(options))
    items: list[tuple[str, Any]] = [(item, item) for item in options.items]
    if options.data and options.text_b:
        items += _pairs(options)
    elif options.data:
        items += _items(options, model)
    try:
        lines = _lines(model, items)
    except DataError:
        usable = _usable(model, items, " ".join(options.data)) if options.data else items
        if len(usable) == len(items):
            raise
        lines = _lines(model, usable)
    for line in lines:
        print(line)


def _lines(model: Any, items: list[tuple[str, Any]]) -> list[str]:
    """What is printed of each item, one line however many its text has."""
    from selfsup.readable import name_of

    names = [" ".join(name_of(place, item).split()) for place, item in items]
    values = [item for _, item in items]
    if "anomaly" in model.values:
        from selfsup.evaluation.anomaly import line

        return list(map(line, names, model.anomalies(values)))
    task = model.values.get("task", {}).get("name")
    if task == "classification":
        shares = model.predict_proba(values)
        labels = [f"{model.names[share.argmax()]}\t{share.max():.4f}" for share in shares]
        return [f"{label}\t{name}" for label, name in zip(labels, names, strict=True)]
    lines = []
    for name, answer in zip(names, model.predict(values), strict=True):
        if task == "tagging":
            lines.append(" ".join(f"{w}/{t}" for w, t in zip(name.split(), answer, strict=True)))
        else:
            said = " ".join(answer.split()) if isinstance(answer, str) else f"{answer:.6g}"
            lines.append(f"{said}\t{name}")
    return lines


def _usable(model: Any, items: list[tuple[str, Any]], source: str) -> list[tuple[str, Any]]:
    """The items but for those that cannot be read, which are counted and named.

    Raises:
        DataError: too many cannot.
    """
    from selfsup.data.bad_items import BadItems
    from selfsup.readable import refusals

    reasons = refusals(model, [item for _, item in items])
    bad = BadItems(source)
    bad.more(len(reasons), [f"{items[i][0]}: {reason}" for i, reason in reasons.items()])
    bad.check(len(items))
    return [item for i, item in enumerate(items) if i not in reasons]


def _items(options: argparse.Namespace, model: Any) -> list[tuple[str, Any]]:
    """(place, item) of everything in --data, read as the model's data are."""
    from selfsup import registry

    data_module = registry.module_of(registry.DATA, "data", model.values["data"]["name"])
    return list(data_module.read_items(sources_of(options), options.text, model.preprocessor))


def _pairs(options: argparse.Namespace) -> list[tuple[str, Any]]:
    from selfsup.data.label_files import find_column, table

    pairs = []
    for path in map(Path, options.data):
        columns, records = table(path)
        a = find_column(path, columns, "text", options.text)
        b = find_column(path, columns, "text_b", options.text_b)
        pairs += [(row.where, (str(row.cells[a]), str(row.cells[b]))) for row in records]
    return pairs
