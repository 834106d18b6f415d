"""The verbs `pretrain` and `finetune`.

Nothing heavy is imported before one of them runs.
"""

import argparse
from typing import Any

from selfsup.commands.options import (
    column_options,
    columns_of,
    say_next,
    say_next_of_task,
    set_option,
    settings_of,
    sources_of,
    verb,
)


def add(parsers: Any) -> None:
    """Adds these verbs to the command line."""
    p = verb(
        parsers,
        "pretrain",
        pretrain,
        "learn from unlabeled data",
        "  selfsup pretrain bert-tiny-english --data texts/ --out runs/mine\n"
        "  selfsup pretrain my.toml --data 'logs/*.jsonl.gz' --out runs/logs \\\n"
        "      --set training.minutes=30 method.mask_rate=0.3\n"
        "  selfsup pretrain bert-tiny-english --data texts/ --out runs/mine --resume\n"
        "  selfsup pretrain bert-mini-multilingual --data en=novels/ zh=histories/ --out runs/two",
    )
    p.add_argument("recipe", help="a named recipe (selfsup list recipes) or a TOML file")
    p.add_argument(
        "--data",
        required=True,
        nargs="+",
        help="files, folders, globs, or hf:NAME; NAME=PATH,PATH for each of several languages",
    )
    p.add_argument("--out", required=True, help="the run folder to make")
    p.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in --out"
    )
    p.add_argument("--record", metavar="NAME", help="write the result to docs/results/NAME.json")
    set_option(p, "training.steps=2000 model.layers=4")

    p = verb(
        parsers,
        "finetune",
        finetune,
        "adapt a pre-trained run to a task with labels",
        "  selfsup finetune runs/mine --task classification --data reviews.csv --out runs/reviews\n"
        "  selfsup finetune runs/mine --task tagging --data train.conllu --valid dev.conllu \\\n"
        "      --tuning probe --out runs/tags --set training.lr=1e-3\n"
        "  selfsup finetune runs/bart --task generation --data train.en.gz:train.de.gz \\\n"
        "      --out runs/en-de --set task.num_beams=4",
    )
    p.add_argument("model", help="a pre-trained run folder")
    p.add_argument(
        "--task",
        required=True,
        help="classification, tagging, regression, span_qa, generation, cloze",
    )
    p.add_argument(
        "--data",
        required=True,
        help="labelled file: csv, tsv, jsonl, conllu, SQuAD json; generation: lines of text as "
        "SOURCES:TARGETS, or a mixture of tasks as .toml",
    )
    p.add_argument("--valid", help="labelled file that is followed while training")
    p.add_argument("--out", required=True, help="the run folder to make")
    p.add_argument(
        "--tuning",
        default="full",
        help="which parameters move (selfsup list tunings); + joins several",
    )
    p.add_argument("--max-length", type=int, help="longest item; texts: in tokens (128)")
    p.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in --out"
    )
    set_option(p, "training.steps=500 training.lr=1e-3 task.dropout=0.0")
    column_options(p)


def pretrain(options: argparse.Namespace) -> None:
    """Learns from unlabeled data; prints the run folder."""
    from selfsup import api, ranks, results

    run = api.pretrain(
        options.recipe, sources_of(options), options.out, settings_of(options), options.resume
    )
    if options.record and ranks.first():
        results.record_pretraining(options.record, run)
    if ranks.first():
        print(run)
        say_next(run)


def finetune(options: argparse.Namespace) -> None:
    """Adapts a run to a task; prints the run folder."""
    from selfsup import api, ranks

    run = api.finetune(
        options.model,
        options.task,
        options.data,
        options.out,
        valid=options.valid,
        tuning=options.tuning,
        settings=settings_of(options),
        columns=columns_of(options),
        max_length=options.max_length,
        resume=options.resume,
    )
    if ranks.first():
        print(run)
        say_next_of_task(run)
