"""The verbs that measure a run: `compare`, `probe`, `align`, `evaluate`.

Nothing heavy is imported before one of them runs.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from selfsup import console
from selfsup.commands.options import column_options, columns_of, set_option, settings_of, verb
from selfsup.errors import ConfigError


def add(parsers: Any) -> None:
    """Adds these verbs to the command line."""
    p = verb(
        parsers,
        "compare",
        compare,
        "measure what pre-training was worth: against scratch and a classical baseline",
        "  selfsup compare runs/mine --task classification --data reviews.csv\n"
        "  selfsup compare runs/mine --task tagging --data train.conllu --valid dev.conllu \\\n"
        "      --test test.conllu --labels 50 300 2000 --seeds 0 1 2 3 4\n"
        "  selfsup compare runs/mine --task classification --data reviews.csv \\\n"
        "      --tuning full,lora,lora+bias,probe --set tuning.lora.rank=16",
    )
    p.add_argument("model", help="a pre-trained run folder")
    p.add_argument(
        "--task",
        required=True,
        help="classification, tagging, regression, span_qa, generation, cloze",
    )
    p.add_argument("--data", required=True, help="labelled file that subsets are drawn from")
    p.add_argument("--valid", help="labelled file that chooses learning rates (default: split off)")
    p.add_argument("--test", help="labelled file that is scored (default: split off)")
    p.add_argument("--labels", nargs="+", type=int, metavar="N", help="numbers of labels")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds (0 1 2)")
    p.add_argument("--lrs", nargs="+", type=float, help="learning rates that are tried (by tuning)")
    p.add_argument("--steps", type=int, help="steps per training (default: by number of labels)")
    p.add_argument(
        "--tuning",
        default="full",
        help="names (selfsup list tunings), + for together, commas for one after the other (full)",
    )
    p.add_argument("--max-length", type=int, help="longest item; texts: in tokens (128)")
    p.add_argument(
        "--jobs", type=int, default=0, help="trainings side by side (0: one per core, at most 8)"
    )
    p.add_argument("--out", help="another place for compare.json")
    p.add_argument("--record", metavar="NAME", help="write the result to docs/results/NAME.json")
    set_option(p, "tuning.lora.rank=16 task.template=topic.txt")
    column_options(p)

    p = verb(
        parsers,
        "probe",
        probe,
        "see what frozen features are worth: kNN and linear probe, beside an untrained network",
        "  selfsup probe runs/photos --data train.parquet --test test.parquet\n"
        "  selfsup probe runs/speech --data wavs/ --across-groups \\\n"
        "      --label '(?P<label>\\d)_(?P<group>[a-z]+)_'\n"
        "  selfsup probe runs/load --task forecasting --data load.csv --horizon 24",
    )
    p.add_argument("model", help="a pre-trained run folder")
    p.add_argument(
        "--task", default="classification", help="classification (default), regression, forecasting"
    )
    p.add_argument("--data", required=True, help="labelled file or folder that fits the probes")
    p.add_argument("--valid", help="labelled data that choose their settings (default: split off)")
    p.add_argument("--test", help="labelled data that are scored once (default: split off)")
    p.add_argument("--max-length", type=int, help="longest item; texts: in tokens (128)")
    p.add_argument(
        "--across-groups", action="store_true", help="leave out one group (a speaker) at a time"
    )
    p.add_argument("--folds", type=int, default=0, help="parts of the groups (one for each group)")
    p.add_argument("--shots", type=int, default=1, help="labels per class and group, for `few` (1)")
    p.add_argument("--horizon", type=int, default=0, help="rows to forecast (96)")
    p.add_argument(
        "--splits",
        default="",
        metavar="ett|SHARES|ROWS",
        help="rows to fit, to choose and to score forecasts: 0.7,0.1,0.2 (default: the run's)",
    )
    p.add_argument("--record", metavar="NAME", help="write the result to docs/results/NAME.json")
    column_options(p)

    p = verb(
        parsers,
        "align",
        align,
        "see whether translations lie close to each other, layer by layer",
        "  selfsup align runs/two --data pairs.tsv\n"
        "  selfsup align runs/two --data words.jsonl --text en --text-b zh",
    )
    p.add_argument("model", help="a pre-trained run of several languages")
    p.add_argument("--data", required=True, help="pairs: csv, tsv, jsonl, parquet")
    p.add_argument("--text", metavar="COLUMN", help="one language (default: the first of two)")
    p.add_argument("--text-b", metavar="COLUMN", help="the other one (the second of two)")
    p.add_argument("--record", metavar="NAME", help="write the result to docs/results/NAME.json")

    p = verb(
        parsers,
        "evaluate",
        evaluate,
        "score a run on data it was not trained on",
        "  selfsup evaluate runs/mine                       held-out loss of its own corpus\n"
        "  selfsup evaluate runs/mine --data other.txt\n"
        "  selfsup evaluate runs/reviews --data test.csv    metrics of a fine-tuned run\n"
        "  selfsup evaluate runs/mine --suite glue --data glue/ --labels 200\n"
        "      fine-tunes and scores every task of a suite (selfsup list suites, or a TOML file)\n"
        "  selfsup evaluate runs/rows --data test.csv --label class --normal ok\n"
        "      anomalies that a pre-trained autoencoder finds, beside other detectors",
    )
    p.add_argument("model", help="a run folder")
    p.add_argument(
        "--data",
        help="unlabeled text, for a fine-tuned run a labelled file, for a suite its folder",
    )
    p.add_argument(
        "--normal", metavar="VALUE", help="the label of normal rows, all others being anomalies"
    )
    p.add_argument("--record", metavar="NAME", help="write the result to docs/results/NAME.json")
    p.add_argument(
        "--exits",
        metavar="VALID",
        help="score and speed of early exits, whose thresholds are chosen on this labelled file",
    )
    set_option(p, "task.exits.rule=patience task.exits.patience=2 task.num_beams=4")
    column_options(p)
    group = p.add_argument_group("a suite of tasks")
    group.add_argument("--suite", metavar="NAME|FILE", help="a suite (selfsup list suites) or TOML")
    group.add_argument("--labels", type=int, metavar="N", help="training examples a task (all)")
    group.add_argument("--seeds", nargs="+", type=int, help="seeds (0)")
    group.add_argument("--lrs", nargs="+", type=float, help="learning rates to choose from")
    group.add_argument(
        "--steps", type=int, help="steps per training (default: by number of labels)"
    )
    group.add_argument("--tuning", help="names (selfsup list tunings), + for together (full)")
    group.add_argument("--max-length", type=int, help="longest item; texts: in tokens (128)")
    group.add_argument("--out", help="folder of results (suite-NAME in the run folder)")


def compare(options: argparse.Namespace) -> None:
    """Compares the arms; prints a table and the verdict."""
    from selfsup import api, results
    from selfsup.evaluation.compare_settings import default_jobs

    settings = {"seeds": tuple(options.seeds), "steps": options.steps, "tuning": options.tuning}
    settings |= {
        **_sections(options),
        "max_length": options.max_length,
        "jobs": options.jobs or default_jobs(),
    }
    if options.lrs:
        settings["lrs"] = tuple(options.lrs)
    result = api.compare(
        options.model,
        options.task,
        options.data,
        valid=options.valid,
        test=options.test,
        columns=columns_of(options),
        out=options.out,
        label_counts=options.labels,
        **settings,
    )
    if options.record:
        results.record_comparison(options.record, result)
    _print_comparison(Path(options.out) if options.out else Path(options.model) / "compare.json")
    console.say(f"next: selfsup report {options.model}")


def _sections(options: argparse.Namespace) -> dict[str, Any]:
    """What --set says of task and tunings; it may say nothing else."""
    from selfsup.config import overridden

    values = overridden({"task": {}, "tuning": {}}, settings_of(options))
    for section in values:
        if section not in ("task", "tuning"):
            raise ConfigError(
                f"--set of compare changes task.KEY and tuning.NAME.KEY alone, got {section!r}"
            )
    return {"task_options": values["task"], "tuning_options": values["tuning"]}


def _print_comparison(path: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from selfsup.reporting.evidence import arm_name, arm_order, interval, verdict
    from selfsup.reporting.runs import read_compare
    from selfsup.reporting.tunings import table as tunings_table

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
    if len(compare.tunings) > 1:
        head, rows = tunings_table(compare)
        table = Table(*head, title="The pre-trained network, tuning by tuning")
        for row in rows:
            table.add_row(*row)
        Console().print(table)
    words = verdict(compare, compare.label_counts[0])
    print(f"{words.headline}\n{words.conclusion}")


def probe(options: argparse.Namespace) -> None:
    """Probes frozen features; prints a line per kind of features."""
    from selfsup import api, results

    result = api.probe(
        options.model,
        options.task,
        options.data,
        valid=options.valid,
        test=options.test,
        columns=columns_of(options),
        max_length=options.max_length,
        across=options.across_groups,
        folds=options.folds,
        shots=options.shots,
        horizon=options.horizon,
        splits=options.splits,
    )
    if options.record:
        results.record_probe(options.record, options.model, result)
    width = max(12, *map(len, result["scores"]))
    for name, scores in result["scores"].items():
        print("\t".join([f"{name:<{width}}", *(f"{k} {v:.4f}" for k, v in scores.items())]))
    console.say(f"next: selfsup report {options.model}")


def align(options: argparse.Namespace) -> None:
    """Looks for translations; prints a table with a line per layer."""
    from rich.console import Console
    from rich.table import Column, Table

    from selfsup import api, results

    columns = {"text": options.text, "text_b": options.text_b}
    result = api.align(options.model, options.data, columns)
    if options.record:
        results.record_alignment(options.record, options.model, result)
    there, back = "→".join(result["languages"]), "→".join(reversed(result["languages"]))
    keys = [f"{prefix}mrr{suffix}" for prefix in ("", "centred_") for suffix in ("", "_back")]
    heads = [f"{name} {way}" for name in ("MRR", "centred") for way in (there, back)]
    by_chance = f"by chance {result['chance']:.3f}"
    title = f"mean reciprocal rank of {result['pairs']:,} translations; {by_chance}"
    table = Table(Column("vectors", no_wrap=True), "layer", *heads, title=title)
    for name, layers in result["scores"].items():
        for layer, scores in enumerate(layers):
            place = "" if len(layers) == 1 else str(layer)
            table.add_row(name, place, *(f"{scores[key]:.3f}" for key in keys))
    Console().print(table)
    console.say(f"next: selfsup report {options.model}")


def evaluate(options: argparse.Namespace) -> None:
    """Scores a run; prints a line per metric, or the table of a suite."""
    from selfsup import api, results

    started = time.monotonic()
    names = ("labels", "seeds", "lrs", "steps", "tuning", "max_length")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.suite is not None:
        _evaluate_suite(options, given)
        return
    if given or options.out:
        raise ConfigError(f"--{next(iter(given), 'out').replace('_', '-')} is for a --suite")
    if options.exits is not None:
        _evaluate_exits(options)
        return
    scores = api.evaluate(
        options.model, options.data, columns_of(options), options.normal, settings_of(options)
    )
    if options.record:
        seconds = time.monotonic() - started
        results.record_evaluation(options.record, options.model, scores, seconds)
    for name, value in scores.items():
        if isinstance(value, dict):  # a detector of anomalies, or a corpus of several
            print("\t".join([f"{name:<20}", *(f"{k} {v:.4f}" for k, v in value.items())]))
        else:
            print(f"{name}\t{value:.6g}")


def _evaluate_exits(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from selfsup import results
    from selfsup.evaluation import early_exit

    if options.data is None:
        raise ConfigError("--exits chooses on its file and scores on another: give --data TEST")
    if options.set:
        raise ConfigError("--exits tries every setting: leave --set out")
    found = early_exit.measure_run(options.model, options.exits, options.data, columns_of(options))
    if options.record:
        scores = {key: found[key] for key in ("metric", "full", "settings", "chosen")}
        results.record_evaluation(options.record, options.model, scores, found["seconds"])
    header, *rows = early_exit.table(found)
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _evaluate_suite(options: argparse.Namespace, given: dict[str, Any]) -> None:
    from selfsup import results
    from selfsup.evaluation.suite import evaluate_suite

    if options.normal or columns_of(options):
        raise ConfigError("a suite says itself which columns it reads; leave them out")
    if options.set:
        raise ConfigError("--set is not for a --suite")
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    started = time.monotonic()
    result = evaluate_suite(options.model, options.suite, options.data, options.out, **settings)
    if options.record:
        results.record_suite(options.record, result, time.monotonic() - started)
    _print_suite(result)
    console.say(f"next: selfsup report {options.model}")


def _print_suite(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    from selfsup.reporting.suite import metrics_of, overall, percent

    lines = list(result["lines"].values())
    titles = [line["title"] for line in lines]
    task_column = Column("task", no_wrap=True)
    table = Table(task_column, "score", "majority", "metrics", *titles, title=result["title"])
    for name, task in result["tasks"].items():
        done = task["state"] == "done"
        others = [
            f"{100 * line['scores'][name]:.1f}" if name in line["scores"] else "" for line in lines
        ]
        shown = percent(task["score"]) if done else task["state"]
        most = task.get("majority")  # what always giving the most frequent class would score
        about = ("" if most is None else f"{100 * most:.1f}", metrics_of(task) if done else "")
        table.add_row(task["title"], shown, *about, *others)
    Console().print(table)
    for task in result["tasks"].values():
        if task["state"] == "missing":
            print(f"missing: {task['title']}\t{', '.join(task['missing'])}")
        if task["state"] == "not supported":
            print(f"not supported: {task['title']}\t{task['why']}")
    if result["overall"]["tasks"]:
        print(overall(result))
