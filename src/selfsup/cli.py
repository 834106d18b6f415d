"""The command line: every verb teaches by example, answers at once, and ends with the next step."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from selfsup import console
from selfsup.errors import ConfigError, SelfsupError, nearest

EPILOG = """\
a first run:
  selfsup list recipes
  selfsup pretrain bert-tiny-english --data texts/ --out runs/mine
  selfsup compare runs/mine --task classification --data reviews.csv
  selfsup report runs/mine

exit codes: 0 done, 2 wrong use, 3 bad data, 4 diverged, 5 storage, 130/143 stopped and resumable
"""


class _Parser(argparse.ArgumentParser):
    """argparse, with the nearest word named and our exit code."""

    def error(self, message: str) -> Any:
        self.exit(2, f"error: {message}\nsee: {self.prog} --help\n")


def _verb(
    verbs: Any, name: str, run: Callable[[argparse.Namespace], None], summary: str, example: str
) -> argparse.ArgumentParser:
    parser = verbs.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _set_option(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        action="extend",
        metavar="KEY=VALUE",
        help=f"change the configuration: {example}",
    )


def _column_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("columns, where they do not have their usual names")
    group.add_argument("--text", metavar="COLUMN", help="the text")
    group.add_argument("--text-b", metavar="COLUMN", help="the second text of a pair")
    group.add_argument("--label", metavar="COLUMN", help="the label; for CoNLL-U also xpos, deprel")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog="selfsup",
        description="Pre-train on your own unlabeled data, adapt with few labels, "
        "and see with evidence what the pre-training was worth.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)
    _add_training_verbs(verbs)
    _add_using_verbs(verbs)
    _add_looking_verbs(verbs)
    return parser


def _add_training_verbs(verbs: Any) -> None:
    p = _verb(
        verbs,
        "pretrain",
        _pretrain,
        "learn from unlabeled data",
        "  selfsup pretrain bert-tiny-english --data texts/ --out runs/mine\n"
        "  selfsup pretrain my.toml --data 'logs/*.jsonl.gz' --out runs/logs \\\n"
        "      --set training.minutes=30 method.mask_rate=0.3\n"
        "  selfsup pretrain bert-tiny-english --data texts/ --out runs/mine --resume",
    )
    p.add_argument("recipe", help="a named recipe (selfsup list recipes) or a TOML file")
    p.add_argument("--data", required=True, nargs="+", help="files, folders, globs, or hf:NAME")
    p.add_argument("--out", required=True, help="the run folder to make")
    p.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in --out"
    )
    p.add_argument("--record", metavar="NAME", help="write the result to docs/results/NAME.json")
    _set_option(p, "training.steps=2000 model.layers=4")

    p = _verb(
        verbs,
        "finetune",
        _finetune,
        "adapt a pre-trained run to a task with labels",
        "  selfsup finetune runs/mine --task classification --data reviews.csv --out runs/reviews\n"
        "  selfsup finetune runs/mine --task tagging --data train.conllu --valid dev.conllu \\\n"
        "      --tuning probe --out runs/tags --set training.lr=1e-3",
    )
    p.add_argument("model", help="a pre-trained run folder")
    p.add_argument("--task", required=True, help="classification, tagging or regression")
    p.add_argument("--data", required=True, help="labelled file: csv, tsv, jsonl, conllu")
    p.add_argument("--valid", help="labelled file that is followed while training")
    p.add_argument("--out", required=True, help="the run folder to make")
    p.add_argument("--tuning", default="full", help="full, or probe (frozen encoder)")
    p.add_argument("--max-length", type=int, default=128, help="longest row in tokens (128)")
    p.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in --out"
    )
    _set_option(p, "training.steps=500 training.lr=1e-3 task.dropout=0.0")
    _column_options(p)

    p = _verb(
        verbs,
        "compare",
        _compare,
        "measure what pre-training was worth: against scratch and a classical baseline",
        "  selfsup compare runs/mine --task classification --data reviews.csv\n"
        "  selfsup compare runs/mine --task tagging --data train.conllu --valid dev.conllu \\\n"
        "      --test test.conllu --labels 50 300 2000 --seeds 0 1 2 3 4",
    )
    p.add_argument("model", help="a pre-trained run folder")
    p.add_argument("--task", required=True, help="classification, tagging or regression")
    p.add_argument("--data", required=True, help="labelled file that subsets are drawn from")
    p.add_argument("--valid", help="labelled file that chooses learning rates (default: split off)")
    p.add_argument("--test", help="labelled file that is scored (default: split off)")
    p.add_argument("--labels", nargs="+", type=int, metavar="N", help="numbers of labels")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds (0 1 2)")
    p.add_argument("--lrs", nargs="+", type=float, help="learning rates that both arms try")
    p.add_argument("--steps", type=int, help="steps per training (default: by number of labels)")
    p.add_argument("--tuning", default="full", help="full, or probe (frozen encoder)")
    p.add_argument("--max-length", type=int, default=128, help="longest row in tokens (128)")
    p.add_argument("--jobs", type=int, default=0, help="trainings side by side (0: one per core)")
    p.add_argument("--out", help="another place for compare.json")
    p.add_argument("--record", metavar="NAME", help="write the result to docs/results/NAME.json")
    _column_options(p)

    p = _verb(
        verbs,
        "evaluate",
        _evaluate,
        "score a run on data it was not trained on",
        "  selfsup evaluate runs/mine                       held-out loss of its own corpus\n"
        "  selfsup evaluate runs/mine --data other.txt\n"
        "  selfsup evaluate runs/reviews --data test.csv    metrics of a fine-tuned run",
    )
    p.add_argument("model", help="a run folder")
    p.add_argument("--data", help="unlabeled text, or for a fine-tuned run a labelled file")
    p.add_argument("--record", metavar="NAME", help="write the result to docs/results/NAME.json")
    _column_options(p)


def _add_using_verbs(verbs: Any) -> None:
    p = _verb(
        verbs,
        "embed",
        _embed,
        "turn texts into vectors",
        "  selfsup embed runs/mine --data lines.txt --out vectors.npy",
    )
    p.add_argument("model", help="a run folder")
    p.add_argument(
        "--data", required=True, nargs="+", help="texts: one per line of .txt, or a column"
    )
    p.add_argument("--text", default="text", metavar="COLUMN", help="column of csv, jsonl, parquet")
    p.add_argument("--out", required=True, help="a .npy file: (texts, dim) float32")
    p.add_argument("--batch-size", type=int, default=64, help="texts per forward pass (64)")

    p = _verb(
        verbs,
        "fill",
        _fill,
        "fill the blanks of a text",
        "  selfsup fill runs/mine 'He closed the [MASK] and went home.'",
    )
    p.add_argument("model", help="a masked_language run")
    p.add_argument("text", help="a text with one or more [MASK]")
    p.add_argument("--top", type=int, default=5, help="candidates per blank (5)")

    p = _verb(
        verbs,
        "generate",
        _generate,
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

    p = _verb(
        verbs,
        "predict",
        _predict,
        "label new items with a fine-tuned run",
        "  selfsup predict runs/reviews 'A wonderful film.'\n"
        "  selfsup predict runs/reviews --data new.csv > labels.tsv",
    )
    p.add_argument("model", help="a fine-tuned run folder")
    p.add_argument("items", nargs="*", help="texts")
    p.add_argument("--data", nargs="+", help="texts: one per line of .txt, or a column")
    p.add_argument("--text", default="text", metavar="COLUMN", help="column of csv, jsonl, parquet")


def _add_looking_verbs(verbs: Any) -> None:
    p = _verb(
        verbs,
        "report",
        _report,
        "write one HTML page about a run or several",
        "  selfsup report runs/mine\n  selfsup report runs/* --out comparison.html",
    )
    p.add_argument("models", nargs="+", help="run folders")
    p.add_argument("--out", help="the file (default: report.html in the first run)")
    p.add_argument("--figure", metavar="PNG", help="also draw the first run's comparison")

    p = _verb(
        verbs,
        "list",
        _list,
        "show what there is",
        "  selfsup list recipes\n  selfsup list methods",
    )
    p.add_argument("what", nargs="?", help="recipes, methods, models, tasks, tunings or data")

    p = _verb(
        verbs,
        "doctor",
        _doctor,
        "check the installation, a data folder or a run",
        "  selfsup doctor\n  selfsup doctor texts/\n  selfsup doctor runs/mine",
    )
    p.add_argument("path", nargs="?", help="data or a run folder")
    p.add_argument("--text", default="text", metavar="COLUMN", help="column of csv, jsonl, parquet")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; gives the exit code of errors.py."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.version:
        import importlib.metadata

        print(importlib.metadata.version("selfsup"))
        return 0
    if options.verb is None:
        parser.print_help()
        return 0
    try:
        options.run(options)
    except SelfsupError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `selfsup predict ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    from selfsup.config import parse_setting

    return dict(parse_setting(text) for text in options.set)


def _columns(options: argparse.Namespace) -> dict[str, str]:
    given = {"text": options.text, "text_b": options.text_b, "label": options.label}
    return {name: column for name, column in given.items() if column is not None}


def _sources(options: argparse.Namespace) -> str | list[str]:
    return options.data[0] if len(options.data) == 1 else options.data


def _pretrain(options: argparse.Namespace) -> None:
    from selfsup import api

    run = api.pretrain(
        options.recipe, _sources(options), options.out, _settings(options), options.resume
    )
    if options.record:
        api.record_pretraining(options.record, run)
    print(run)
    api.say_next(run)


def _finetune(options: argparse.Namespace) -> None:
    from selfsup import api

    run = api.finetune(
        options.model,
        options.task,
        options.data,
        options.out,
        valid=options.valid,
        tuning=options.tuning,
        settings=_settings(options),
        columns=_columns(options),
        max_length=options.max_length,
        resume=options.resume,
    )
    print(run)
    console.say(f"next: selfsup evaluate {run} --data TEST   or   selfsup predict {run} 'a text'")


def _compare(options: argparse.Namespace) -> None:
    from selfsup import api

    settings = {"seeds": tuple(options.seeds), "steps": options.steps, "tuning": options.tuning}
    settings |= {
        "max_length": options.max_length,
        "jobs": options.jobs or len(os.sched_getaffinity(0)),
    }
    if options.lrs:
        settings["lrs"] = tuple(options.lrs)
    result = api.compare(
        options.model,
        options.task,
        options.data,
        valid=options.valid,
        test=options.test,
        columns=_columns(options),
        out=options.out,
        label_counts=options.labels,
        **settings,
    )
    if options.record:
        api.record_comparison(options.record, result)
    _print_comparison(Path(options.out) if options.out else Path(options.model) / "compare.json")
    console.say(f"next: selfsup report {options.model}")


def _print_comparison(path: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from selfsup.report.evidence import arm_name, arm_order, interval, verdict
    from selfsup.report.runs import read_compare

    compare = read_compare(path)
    arms = arm_order(compare)
    table = Table("labels", *map(arm_name, arms), title=f"{compare.metric}, mean and 95% interval")
    for count in compare.label_counts:
        cells = [interval(compare.scores[arm][count]) for arm in arms]
        shown = [
            f"{mean:.3f}" + (f" ±{half:.3f}" if half is not None else "") for mean, half in cells
        ]
        table.add_row(f"{count:,}", *shown)
    Console().print(table)
    words = verdict(compare, compare.label_counts[0])
    print(f"{words.headline}\n{words.conclusion}")


def _evaluate(options: argparse.Namespace) -> None:
    from selfsup import api

    scores = api.evaluate(options.model, options.data, _columns(options))
    if options.record:
        api.record_evaluation(options.record, options.model, scores)
    for name, value in scores.items():
        print(f"{name}\t{value:.6g}")


def _texts(options: argparse.Namespace) -> list[str]:
    from selfsup.data.reading import documents

    found = documents(_sources(options), text_column=options.text, split="line")
    return [document.text for document in found]


def _embed(options: argparse.Namespace) -> None:
    import io

    import numpy as np

    from selfsup import api
    from selfsup.files import write_bytes

    texts = _texts(options)
    vectors = api.load(options.model).embed(texts, options.batch_size)
    buffer = io.BytesIO()
    np.save(buffer, vectors, allow_pickle=False)
    path = Path(options.out)
    write_bytes(path, buffer.getvalue())
    print(f"{path}\t{vectors.shape[0]} x {vectors.shape[1]} float32")


def _fill(options: argparse.Namespace) -> None:
    from selfsup import api

    for number, blank in enumerate(api.load(options.model).fill(options.text, options.top), 1):
        for word, probability in blank.candidates:
            print(f"{number}\t{word}\t{probability:.4f}")


def _generate(options: argparse.Namespace) -> None:
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


def _predict(options: argparse.Namespace) -> None:
    from selfsup import api

    if not options.items and not options.data:
        raise ConfigError("nothing to predict: give texts, or --data FILE")
    texts = list(options.items) + (_texts(options) if options.data else [])
    for text, (value, probability) in zip(
        texts, api.load(options.model).predict(texts), strict=True
    ):
        if isinstance(value, list):
            print(" ".join(f"{w}/{t}" for w, t in zip(text.split(), value, strict=True)))
            continue
        sure = "" if probability is None else f"\t{probability:.4f}"
        print(f"{value}{sure}\t{text}")


def _report(options: argparse.Namespace) -> None:
    from selfsup import api

    print(api.report(options.models, options.out, options.figure))


def _list(options: argparse.Namespace) -> None:
    from selfsup import registry
    from selfsup.config import read_toml

    tables = dict.fromkeys(("recipes", *registry.TABLES))
    wanted = list(tables) if options.what is None else [options.what]
    if wanted[0] not in tables:
        raise ConfigError(f"cannot list {options.what!r}{nearest(options.what, tables)}")
    for what in wanted:
        if options.what is None:
            print(f"{what}:")
        rows: dict[str, str]
        if what == "recipes":
            paths = registry.recipe_paths()
            rows = {name: read_toml(path)["recipe"]["summary"] for name, path in paths.items()}
        else:
            rows = {n: registry.summary(target) for n, target in registry.TABLES[what].items()}
        if what == "models":
            presets = read_toml(Path(registry.__file__).parent / "models" / "presets.toml")
            rows |= {f"  {name}": preset["summary"] for name, preset in presets.items()}
        for name, text in rows.items():
            print(f"  {name:<22} {text}")


def _doctor(options: argparse.Namespace) -> None:
    from selfsup import doctor

    for line in doctor.examine(options.path, options.text):
        print(line)
