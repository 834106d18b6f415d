"""The verbs `pet` and `self-train`: few labels, and many items without.

Nothing heavy is imported before one of them runs.
"""

import argparse
from typing import Any

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
        "pet",
        pet,
        "learn from few labels and many texts without, by templates with a blank",
        "  selfsup pet runs/mine --templates cloze-sentiment-it-was cloze-sentiment-just \\\n"
        "      --data few.tsv --unlabelled texts.txt --out runs/reviews\n"
        "  selfsup pet runs/mine --templates mine.txt other.txt --data few.tsv --zero-shot\n"
        "  selfsup pet runs/mine --templates mine.txt other.txt --data few.tsv \\\n"
        "      --unlabelled texts.txt --out runs/reviews --set pet.generations=3",
    )
    p.add_argument("model", help="a pre-trained masked_language or gpt_bert run")
    p.add_argument(
        "--templates",
        required=True,
        nargs="+",
        metavar="NAME|FILE",
        help="templates with a blank (selfsup list templates), or text files",
    )
    p.add_argument(
        "--zero-shot", action="store_true", help="score --data with each template, train nothing"
    )
    p.add_argument(
        "--search-words", action="store_true", help="search other words for the classes first"
    )
    p.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in --out"
    )
    _few_label_options(p, required=False)
    set_option(p, "pet.weights=uniform cloze_training.steps=100 training.lr=1e-3")
    column_options(p)

    p = verb(
        parsers,
        "self-train",
        self_train,
        "learn from few labels and many items without, which the classifier labels itself",
        "  selfsup self-train runs/mine --data few.tsv --unlabelled texts.txt --out runs/reviews\n"
        "  selfsup self-train runs/mine --data few.tsv --unlabelled texts.txt --out runs/new \\\n"
        "      --set self_training.threshold=0.95 self_training.rounds=5",
    )
    p.add_argument("model", help="a pre-trained run")
    _few_label_options(p, required=True)
    set_option(p, "self_training.threshold=0.95 training.steps=200")
    column_options(p)


def _few_label_options(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument("--data", required=True, help="labelled file: csv, tsv, jsonl, parquet")
    parser.add_argument(
        "--unlabelled", nargs="+", required=required, metavar="FILE", help="items without labels"
    )
    parser.add_argument("--valid", help="labelled file that is followed while training")
    parser.add_argument("--out", required=required, help="the run folder to make")
    parser.add_argument("--max-length", type=int, help="longest item; texts: in tokens (128)")


def pet(options: argparse.Namespace) -> None:
    """Trains cloze models and a classifier; prints the run folder, or zero-shot accuracies."""
    from selfsup.verbs import few_labels

    if options.zero_shot:
        if options.unlabelled or options.out or options.search_words or options.resume:
            raise ConfigError(
                "--zero-shot trains nothing: it takes --templates and --data, and no --unlabelled, "
                "--out, --search-words or --resume"
            )
        found = few_labels.zero_shot(
            *(options.model, options.templates, options.data),
            columns=columns_of(options),
            settings=settings_of(options),
            max_length=options.max_length,
        )
        for name, accuracy in found.items():
            print(f"{accuracy:.4f}\t{name}")
        return
    if not options.unlabelled or not options.out:
        raise ConfigError("give --unlabelled TEXTS and --out RUN, or --zero-shot to train nothing")
    run = few_labels.pet(
        *(options.model, options.templates, options.data, _unlabelled(options), options.out),
        valid=options.valid,
        settings=settings_of(options),
        columns=columns_of(options),
        max_length=options.max_length,
        search_words=options.search_words,
        resume=options.resume,
    )
    print(run)
    say_next_of_task(run)


def self_train(options: argparse.Namespace) -> None:
    """Trains classifiers, round after round; prints the run folder."""
    from selfsup.verbs import few_labels

    run = few_labels.self_train(
        *(options.model, options.data, _unlabelled(options), options.out),
        valid=options.valid,
        settings=settings_of(options),
        columns=columns_of(options),
        max_length=options.max_length,
    )
    print(run)
    say_next_of_task(run)


def _unlabelled(options: argparse.Namespace) -> Any:
    return options.unlabelled[0] if len(options.unlabelled) == 1 else options.unlabelled
