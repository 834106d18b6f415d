"""The verbs `pet` and `self-train`: few labels, and many items without.

Nothing heavy is imported before one of them runs.
"""

import argparse
from typing import Any

from selfsup import console
from selfsup.errors import ConfigError


def pet(options: argparse.Namespace) -> None:
    """Trains cloze models and a classifier; prints the run folder, or zero-shot accuracies."""
    from selfsup import few_labels

    if options.zero_shot:
        if options.unlabelled or options.out or options.search_words or options.resume:
            raise ConfigError(
                "--zero-shot trains nothing: it takes --templates and --data, and no --unlabelled, "
                "--out, --search-words or --resume"
            )
        found = few_labels.zero_shot(
            *(options.model, options.templates, options.data),
            columns=_columns(options),
            settings=_settings(options),
            max_length=options.max_length,
        )
        for name, accuracy in found.items():
            print(f"{accuracy:.4f}\t{name}")
        return
    if not options.unlabelled or not options.out:
        raise ConfigError("give --unlabelled TEXTS and --out RUN, or --zero-shot to train nothing")
    run = few_labels.pet(
        *(options.model, options.templates, options.data, _sources(options), options.out),
        valid=options.valid,
        settings=_settings(options),
        columns=_columns(options),
        max_length=options.max_length,
        search_words=options.search_words,
        resume=options.resume,
    )
    _say_next(run)


def self_train(options: argparse.Namespace) -> None:
    """Trains classifiers, round after round; prints the run folder."""
    from selfsup import few_labels

    run = few_labels.self_train(
        *(options.model, options.data, _sources(options), options.out),
        valid=options.valid,
        settings=_settings(options),
        columns=_columns(options),
        max_length=options.max_length,
    )
    _say_next(run)


def _sources(options: argparse.Namespace) -> Any:
    return options.unlabelled[0] if len(options.unlabelled) == 1 else options.unlabelled


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    from selfsup.config import parse_setting

    return dict(map(parse_setting, options.set))


def _columns(options: argparse.Namespace) -> dict[str, str]:
    given = {"text": options.text, "text_b": options.text_b, "label": options.label}
    return {name: column for name, column in given.items() if column is not None}


def _say_next(run: Any) -> None:
    print(run)
    console.say(f"next: selfsup evaluate {run} --data TEST   or   selfsup predict {run} 'a text'")
