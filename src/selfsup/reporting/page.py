"""The page: a verdict first, then what it rests on, then how to make it again."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from selfsup.errors import ConfigError
from selfsup.files import write_text
from selfsup.reporting import charts, sections, suite, tunings
from selfsup.reporting.evidence import ARM_NAMES, anomaly_verdict, probe_verdict, verdict
from selfsup.reporting.examples import examples
from selfsup.reporting.markup import code, rounded, section, text, tiles
from selfsup.reporting.runs import Run, finite, read_run

# The page may show style, pictures and sounds that are inside it: no script, no request.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"
DATES = ("date", "finished", "started", "created")


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Writes one self-contained HTML page about one or several runs.

    Args:
        runs: run folders; their paths are shown in commands as they are given here.
        out: the file to write; the same runs give the same bytes.

    Raises:
        ConfigError: no run was given.
        CheckpointError: a folder is not a run, or a file in it is damaged.
        StorageError: `out` cannot be written.
    """
    if not runs:
        raise ConfigError("a report needs at least one run folder, such as runs/first; none given")
    read = [read_run(Path(folder)) for folder in runs]
    write_text(out, page(read))
    return out


def page(runs: Sequence[Run]) -> str:
    """The whole page as HTML text."""
    title = f"{runs[0].name} · selfsup" if len(runs) == 1 else f"{len(runs)} runs · selfsup"
    body = _one(runs[0]) if len(runs) == 1 else _several(runs)
    return html(title, headline(runs[0])[0], body)


def html(title: str, description: str, body: str) -> str:
    """A self-contained page around its content, which is HTML already."""
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f'<meta name="description" content="{text(description)}">'
        f"<title>{text(title)}</title><style>\n{style}</style></head>\n"
        f"<body><main>{body}</main></body></html>\n"
    )


def headline(run: Run) -> tuple[str, str]:
    """The sentence on top and the one under it."""
    if run.compares:
        compare = run.compares[0]
        found = verdict(compare, compare.label_counts[0])
        return found.headline, found.conclusion
    if run.anomaly:
        return anomaly_verdict(run.anomaly["scores"])
    if run.probe:
        return probe_verdict(run.probe["scores"])
    if run.suites:
        return suite.headline(run.suites[0])
    steps, scores = run.curve("score", "valid")
    if scores:
        sentence = f"Validation score {scores[0]:.2f} → {scores[-1]:.2f} in {steps[-1]:,} steps"
        return sentence, f"Task: {run.kind.replace('_', ' ')}." if run.kind else ""
    for split, name in (("valid", "validation"), ("train", "training")):
        steps, losses = run.curve("loss", split)
        if losses:
            sentence = f"{name.capitalize()} loss {losses[0]:.2f} → {losses[-1]:.2f}"
            return f"{sentence} in {steps[-1]:,} steps", "Nothing is compared yet."
    return f"{run.name}: no measurement yet", "This run has logged no loss."


def _one(run: Run) -> str:
    names, body = _run_sections(run, "")
    links = "".join(f'<a href="#{anchor}">{text(name)}</a>' for anchor, name in names)
    return f"<header>{_head(run)}<nav>{links}</nav></header>{body}"


def _several(runs: Sequence[Run]) -> str:
    rows = "".join(
        f'<li><a href="#r{n}">{text(run.name)}</a><br>{text(headline(run)[0])}</li>'
        for n, run in enumerate(runs, 1)
    )
    top = (
        f'<header><p class="eyebrow">selfsup report</p><h1>{len(runs)} runs</h1>'
        f'<ul class="verdicts">{rows}</ul></header>'
    )
    overlay = ""
    if any(run.curve("loss", split)[0] for run in runs for split in ("train", "valid")):
        figure = charts.both_widths(lambda w, h: charts.losses_of_runs(runs, w, h))
        lead = (
            "Lines: training, smoothed. Marks: held out. Losses of different methods or tokenizers "
            "are on different scales; compare shapes, not heights."
        )
        body = f"<figure>{figure}</figure>"
        overlay = section("losses", "Losses of the runs", lead, body)
    parts = [
        f'<article id="r{n}"><header>{_head(run)}</header>{_run_sections(run, f"r{n}-")[1]}'
        "</article>"
        for n, run in enumerate(runs, 1)
    ]
    return top + overlay + "".join(parts)


def _head(run: Run) -> str:
    words = ["selfsup report", run.name, run.kind.replace("_", " "), _date(run)]
    first, second = headline(run)
    warned = "".join(f"<li>{text(warning)}</li>" for warning in run.warnings)
    warned = f'<ul class="warnings" role="alert">{warned}</ul>' if warned else ""
    return (
        f'<p class="eyebrow">{text(" · ".join(w for w in words if w))}</p>{warned}'
        f'<h1>{_colored(first)}</h1><p class="conclusion">{text(second)}</p>{tiles(_numbers(run))}'
    )


def _colored(sentence: str) -> str:
    """The arms of a headline in the colours that they have in every figure."""

    def span(found: re.Match[str]) -> str:
        arm = next(arm for arm, name in ARM_NAMES.items() if name == found["name"])
        return f'<span class="arm {charts.arm_color(arm)}">{found[0]}</span>'

    names = "|".join(ARM_NAMES.values())
    return re.sub(rf"(-?\d+\.\d\d )?(?P<name>{names})", span, text(sentence))


def _date(run: Run) -> str:
    """The run's own date; the page must not depend on when it is written."""
    for part in (run.values, *(v for v in run.values.values() if isinstance(v, dict))):
        for key in DATES:
            if key in part:
                return str(part[key])
    return ""


def _numbers(run: Run) -> dict[str, str]:
    """Up to six numbers that say how large this was."""
    facts = run.values.get("facts", {})
    train = facts.get("train", {})
    known = {
        "documents": facts.get("documents"),
        "train tokens": train.get("tokens") if isinstance(train, dict) else None,
        "parameters": facts.get("parameters"),
    }
    out = {name: rounded(value) for name, value in known.items() if finite(value)}
    steps, _ = run.curve("loss")
    if steps:
        out["steps"] = rounded(steps[-1])
    rows = [row for row in run.speed if finite(row.get("seconds"))]
    if rows:
        out["minutes"] = f"{rows[-1]['seconds'] / 60:.1f}"
    _, valid = run.curve("loss", "valid")
    if valid:
        out["validation loss"] = f"{valid[-1]:.3f}"
    return out


def _run_sections(run: Run, prefix: str) -> tuple[list[tuple[str, str]], str]:
    """(anchor, title) of every section that is there, and their HTML."""
    parts = []
    for place, compare in enumerate(run.compares):
        suffix = "" if len(run.compares) == 1 else f"-{place + 1}"
        name = "What the pre-training is worth"
        name = name if not suffix else f"{name}: {compare.task or compare.name}"
        anchor = f"{prefix}evidence{suffix}"
        parts.append((anchor, "Evidence", sections.evidence(compare, anchor, name)))
        anchor = f"{prefix}tunings{suffix}"
        parts.append((anchor, "Tunings", tunings.tunings(compare, anchor)))
        anchor = f"{prefix}finetuning{suffix}"
        parts.append((anchor, "Fine-tuning", sections.finetuning(compare, anchor)))
    for name, build in (
        ("Suites", suite.suites),
        ("Anomalies", sections.anomalies),
        ("Training", sections.training),
        ("Speed", sections.speed),
        ("Features", sections.probe),
        ("Languages", sections.alignment),
        ("Map", sections.embeddings),
        ("Examples", examples),
        ("Blanks", sections.fills),
        ("Samples", sections.samples),
        ("Data", sections.facts),
        ("Configuration", sections.configuration),
        ("Environment", sections.environment),
        ("Commands", _commands),
        ("Next", _next_steps),
        ("Missing", _missing),
    ):
        anchor = f"{prefix}{name.lower()}"
        parts.append((anchor, name, build(run, anchor)))
    found = [part for part in parts if part[2]]
    return [(anchor, name) for anchor, name, _ in found], "".join(html for _, _, html in found)


def _commands(run: Run, anchor: str) -> str:
    lines = [str(run.values.get("command", {}).get("line", ""))]
    lines += [str(compare.raw.get("command", "")) for compare in run.compares]
    lines.append(f"selfsup report {shlex.quote(str(run.folder))}")
    body = "".join(code(line) for line in dict.fromkeys(lines) if line)
    lead = "One click selects a whole command."
    return section(anchor, "Make it again", lead, body)


def _next_steps(run: Run, anchor: str) -> str:
    """What to try, chosen by what was found; for a pre-training run."""
    if "method" not in run.values:
        return ""
    folder = shlex.quote(str(run.folder))
    again = _elsewhere(str(run.values.get("command", {}).get("line", "")), "-seed1")
    steps = []
    if run.compares:
        compare = run.compares[0]
        found = verdict(compare, compare.label_counts[0])
        if found.winner != "pretrained":
            steps.append(
                "The pre-trained model is not the best yet: give it more unlabelled text of the "
                "same kind, or more steps, before a larger model."
            )
        elif not found.clear:
            steps.append("The lead is inside the noise: run the comparison with more seeds.")
        else:
            steps.append("Pre-training pays here: adapt it to all your labels and use it.")
    losses = run.curve("loss", "valid")[1]
    if len(losses) > 4 and losses[-1] < losses[-3] - 0.005:
        steps.append("The validation loss was still falling at the end: train longer.")
    body = "".join(f"<li>{text(step)}</li>" for step in steps)
    task = run.compares[0].task if run.compares else "classification"
    adapt = f"selfsup finetune {folder} --task {task} --data TRAIN --out {folder}-{task}"
    commands = [(adapt, "Use all labels:")]
    if again:
        again += " --set training.seed=1"
        commands.append((again, "The same with another seed, to see how stable it is:"))
    blocks = "".join(f"<p>{text(why)}</p>{code(line)}" for line, why in commands)
    return section(anchor, "Try next", "", f'<ul class="plain">{body}</ul>{blocks}')


def _elsewhere(command: str, suffix: str) -> str:
    """The command with another --out, so that it does not meet the folder that exists."""
    try:
        words = shlex.split(command)
    except ValueError:  # an unclosed quote in what was typed
        return ""
    if "--out" not in words[:-1]:
        return ""
    words[words.index("--out") + 1] += suffix
    return shlex.join(words)


def _missing(run: Run, anchor: str) -> str:
    """One line for every part that the folder does not hold, with the command that makes it."""
    folder = shlex.quote(str(run.folder))
    pretrain = f"selfsup pretrain RECIPE --data PATH --out {folder}"
    lacking = [
        (not run.metrics, "metrics.jsonl", "loss curves", pretrain),
        (not run.speed, "speed.jsonl", "speed", pretrain),
    ]
    if "task" not in run.values:
        compare = f"selfsup compare {folder} --task classification --data train.csv"
        writes = run.kind == "causal_language"
        of_text = run.values.get("data", {}).get("name", "text") == "text"
        detect = f"selfsup evaluate {folder} --data test.csv --label LABEL"
        lacking += [
            (
                "anomaly" in run.values and not run.anomaly,
                "anomaly.json",
                "how well it tells anomalies",
                detect,
            ),
            (not run.compares, "compare.json", "what the pre-training is worth", compare),
            (
                of_text and not run.fills and not writes,
                "fills.json",
                "filled blanks",
                pretrain,
            ),
            (
                of_text and not run.samples and (writes or not run.kind),
                "samples.json",
                "texts that the model writes",
                pretrain,
            ),
            (
                not run.embeddings,
                "embeddings.json",
                "a map of embeddings",
                compare,
            ),
        ]
    lines = "".join(
        f"<li>{text(what)} <small>({file})</small>{code(command)}</li>"
        for absent, file, what, command in lacking
        if absent
    )
    if not lines:
        return ""
    lead = "These parts are not in the run folder; each command makes one."
    return section(anchor, "Not in this report", lead, f'<ul class="plain">{lines}</ul>')
