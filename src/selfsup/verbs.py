"""What each verb of the command line does with its options; results go to the standard output.

Nothing heavy is imported before a verb runs, so help and `list` answer at once.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from selfsup import console
from selfsup.errors import ConfigError, nearest


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    from selfsup.config import parse_setting

    return dict(parse_setting(text) for text in options.set)


def _columns(options: argparse.Namespace) -> dict[str, str]:
    given = {"text": options.text, "text_b": options.text_b, "label": options.label}
    return {name: column for name, column in given.items() if column is not None}


def _sources(options: argparse.Namespace) -> str | list[str]:
    return options.data[0] if len(options.data) == 1 else options.data


def pretrain(options: argparse.Namespace) -> None:
    """Learns from unlabeled data; prints the run folder."""
    from selfsup import api, results

    run = api.pretrain(
        options.recipe, _sources(options), options.out, _settings(options), options.resume
    )
    if options.record:
        results.record_pretraining(options.record, run)
    print(run)
    api.say_next(run)


def finetune(options: argparse.Namespace) -> None:
    """Adapts a run to a task; prints the run folder."""
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


def compare(options: argparse.Namespace) -> None:
    """Compares the arms; prints a table and the verdict."""
    from selfsup import api, results
    from selfsup.evaluation.compare import default_jobs

    settings = {"seeds": tuple(options.seeds), "steps": options.steps, "tuning": options.tuning}
    settings |= {
        "tuning_options": _tuning_options(options),
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
        columns=_columns(options),
        out=options.out,
        label_counts=options.labels,
        **settings,
    )
    if options.record:
        results.record_comparison(options.record, result)
    _print_comparison(Path(options.out) if options.out else Path(options.model) / "compare.json")
    console.say(f"next: selfsup report {options.model}")


def _tuning_options(options: argparse.Namespace) -> dict[str, Any]:
    """What --set says of tunings, by their names; it may say nothing else."""
    from selfsup.config import overridden

    values = overridden({"tuning": {}}, _settings(options))
    for section in values:
        if section != "tuning":
            raise ConfigError(f"--set of compare changes tuning.NAME.KEY alone, got {section!r}")
    return values["tuning"]


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
        columns=_columns(options),
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
        options.model, options.data, _columns(options), options.normal, _settings(options)
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
    found = early_exit.measure_run(options.model, options.exits, options.data, _columns(options))
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

    if options.normal or _columns(options):
        raise ConfigError("a suite says itself which columns it reads; leave them out")
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


def _items(options: argparse.Namespace, model: Any) -> list[tuple[str, Any]]:
    """(what people call it, the item) for everything in --data, read as the model's data are."""
    from selfsup import registry

    data_module = registry.module_of(registry.DATA, "data", model.values["data"]["name"])
    return list(data_module.read_items(_sources(options), options.text, model.preprocessor))


def _pairs(options: argparse.Namespace) -> list[tuple[str, str]]:
    from selfsup.data.label_files import find_column, table

    pairs = []
    for path in map(Path, options.data):
        columns, records = table(path)
        a = find_column(path, columns, "text", options.text)
        b = find_column(path, columns, "text_b", options.text_b)
        pairs += [(str(record.cells[a]), str(record.cells[b])) for record in records]
    return pairs


def embed(options: argparse.Namespace) -> None:
    """Writes one vector per item."""
    import io

    import numpy as np

    from selfsup import api
    from selfsup.files import write_bytes

    model = api.load(options.model)
    items = [item for _, item in _items(options, model)]
    vectors = model.embed(items, options.batch_size)
    buffer = io.BytesIO()
    np.save(buffer, vectors, allow_pickle=False)
    path = Path(options.out)
    write_bytes(path, buffer.getvalue())
    print(f"{path}\t{vectors.shape[0]} x {vectors.shape[1]} float32")


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
    model = api.load(options.model, settings=_settings(options))
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
        columns=_columns(options),
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
        pool = demonstrations.read_examples(options.data, template, _columns(options), True)
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


def import_(options: argparse.Namespace) -> None:
    """Makes a run of a checkpoint or an adapter; prints the run folder."""
    from selfsup import api

    run = api.import_(options.source, options.out, options.base)
    print(run)
    api.say_next(run)


def export(options: argparse.Namespace) -> None:
    """Writes a run for another library; prints the folder."""
    from selfsup import api

    print(api.export(options.model, options.out, options.to))


def report(options: argparse.Namespace) -> None:
    """Writes the page; prints its path."""
    from selfsup import api

    print(api.report(options.models, options.out, options.figure))


def list_(options: argparse.Namespace) -> None:
    """Prints what there is."""
    from selfsup import registry
    from selfsup.config import presets, read_toml
    from selfsup.data import templates

    tables = dict.fromkeys(("recipes", *registry.TABLES, "suites", "studies", "templates"))
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
        elif what == "suites":
            paths = registry.suite_paths()
            rows = {name: read_toml(path).get("summary", "") for name, path in paths.items()}
        elif what == "studies":
            rows = {n: registry.summary(target) for n, target in registry.STUDIES.items()}
        elif what == "templates":
            rows = {n: templates.load(n, cloze=True).summary for n in templates.paths()}
        else:
            rows = {n: registry.summary(target) for n, target in registry.TABLES[what].items()}
        if what == "models":
            models, rows = rows, {}
            for name, text in models.items():
                rows[name] = text
                sizes = presets().get(name, {})
                rows |= {f"  {size}": values["summary"] for size, values in sizes.items()}
        for name, text in rows.items():
            print(f"  {name:<22} {text}")


def doctor(options: argparse.Namespace) -> None:
    """Prints one line per finding."""
    from selfsup import doctor

    for line in doctor.examine(options.path, options.text, options.kind):
        print(line)


def study(options: argparse.Namespace) -> None:
    """Makes a published claim again; prints its table."""
    from selfsup import environment, registry, results

    started = time.monotonic()
    run = registry.resolve(registry.STUDIES, "study", options.name)
    found = run(Path(options.out), options.only, options.minutes, tuple(options.seeds))
    for method, tasks in found["scores"].items():
        for task, tunings in tasks.items():
            for tuning, arms in tunings.items():
                means = [f"{arm} {sum(x) / len(x):.3f}" for arm, x in arms.items()]
                print("\t".join([method, task, tuning, *means]))
    if options.record:
        more = {key: value for key, value in found.items() if key not in ("scores", "seeds")}
        results.record(
            options.record,
            command=environment.command_line(),
            seeds=found["seeds"],
            seconds=time.monotonic() - started,
            scores=found["scores"],
            **more,
        )
