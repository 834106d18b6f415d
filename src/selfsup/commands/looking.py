"""The verbs that show what there is: `report`, `list`, `doctor`, `study`.

Nothing heavy is imported before one of them runs.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from selfsup.commands.options import verb
from selfsup.errors import ConfigError, nearest


def add(parsers: Any) -> None:
    """Adds these verbs to the command line."""
    p = verb(
        parsers,
        "report",
        report,
        "write one HTML page about a run or several",
        "  selfsup report runs/mine\n  selfsup report runs/* --out comparison.html",
    )
    p.add_argument("models", nargs="+", help="run folders")
    p.add_argument("--out", help="the file (default: report.html in the first run)")
    p.add_argument("--figure", metavar="PNG", help="also draw the first run's comparison")

    p = verb(
        parsers,
        "list",
        list_,
        "show what there is",
        "  selfsup list recipes\n  selfsup list methods",
    )
    p.add_argument(
        "what",
        nargs="?",
        help="recipes, methods, models, tasks, tunings, suites, studies, data, templates",
    )

    p = verb(
        parsers,
        "doctor",
        doctor,
        "check the installation, a data folder or a run",
        "  selfsup doctor\n  selfsup doctor photos/\n  selfsup doctor load.csv --kind series\n"
        "  selfsup doctor runs/mine",
    )
    p.add_argument("path", nargs="?", help="data, a run folder or an index")
    p.add_argument("--text", default="text", metavar="COLUMN", help="column of csv, jsonl, parquet")
    p.add_argument("--kind", help="text, image, audio, table or series (default: guessed)")

    p = verb(
        parsers,
        "study",
        study,
        "make a published claim again at small scale",
        "  selfsup study language_methods --out runs/methods --minutes 4",
    )
    p.add_argument("name", help="a study (selfsup list studies)")
    p.add_argument("--out", required=True, help="folder of its runs; what is there is kept")
    p.add_argument("--only", nargs="+", metavar="ARM", help="a part of the study (all)")
    p.add_argument("--minutes", type=float, default=4.0, help="of each pre-training (4)")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds (0 1 2)")
    p.add_argument("--record", metavar="NAME", help="write the result to docs/results/NAME.json")


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
