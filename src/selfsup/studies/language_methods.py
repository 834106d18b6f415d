"""Which pre-training serves which task: nine methods, one corpus, one tokenizer, one budget.

Each method pre-trains a small network for the same time; then the frozen and the fine-tuned network
are measured on four tasks beside the same network from scratch and TF-IDF, with several seeds. What
the field expects of the order: predicting tokens from both sides serves tagging and pairs better
than from one (Devlin et al., 2018, arXiv 1810.04805), next-sentence prediction adds little and
sentence order more (Lan et al., 2019, arXiv 1909.11942), replaced tokens learn more from the same
text (Clark et al., 2020, arXiv 2003.10555), and word vectors alone come last.

`language_methods.toml` holds corpus, tasks, budgets and methods. The folder of a study keeps the
run of every method; what is done already is not done again.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from selfsup import api, config, console
from selfsup.errors import ConfigError, nearest

FILE = Path(__file__).with_suffix(".toml")


def plan() -> dict[str, Any]:
    """The study's file, with the places of data filled in.

    Raises:
        ConfigError: SELFSUP_DATA is not set.
    """
    if "SELFSUP_DATA" not in os.environ:
        raise ConfigError("this study reads its data below $SELFSUP_DATA: set that variable")

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(inner) for key, inner in value.items()}
        return os.path.expandvars(value) if isinstance(value, str) else value

    return filled(config.read_toml(FILE))


def recipe(values: dict[str, Any], method: str, minutes: float) -> dict[str, Any]:
    """The complete recipe of one method: what all share, and what it changes."""
    base, own = values["base"], values["methods"][method]
    model = dict(base["model"]) | own.get("model", {})
    if model["name"] == "encoder_decoder":  # of the same shape
        model = config.preset_values("transformer", model.pop("preset")) | model
    elif model["name"] == "bag":
        model = {"name": "bag", "dim": 128}
    elif model["name"] == "elmo":
        model = {"name": "elmo", "preset": "elmo-mini"}
    return {
        "data": base["data"] | own.get("data", {}),
        "model": model,
        "method": own["method"],
        "training": base["training"] | own.get("training", {}) | {"minutes": minutes},
    }


def run(
    out: Path,
    only: list[str] | None = None,
    minutes: float = 4.0,
    seeds: tuple[int, ...] = (0, 1, 2),
) -> dict[str, Any]:
    """Trains and measures, and gives what is to be recorded.

    Args:
        out: folder of the study.
        only: names of methods; None: all.
        minutes: of pre-training.
        seeds: of fine-tuning.

    Returns:
        `scores[method][task][tuning][arm]`, each a list with a score per seed; methods that have
        not been run yet are left out.
    """
    values = plan()
    known = values["methods"]
    for name in only or known:
        if name not in known:
            raise ConfigError(f"no method {name!r} in {FILE.name}{nearest(name, known)}")
        _pretrain(values, name, out / name, minutes)
        for task in values["tasks"]:
            for tuning in values["tuning"]:
                _compare(values, out / name, task, tuning, seeds)
    return {"minutes": minutes, "seeds": list(seeds), "scores": _collected(values, out)}


def _pretrain(values: dict[str, Any], name: str, folder: Path, minutes: float) -> None:
    if (folder / "model").is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.parent / f"{name}.toml"
    file.write_text(config.write_toml(recipe(values, name, minutes)), encoding="utf-8")
    started = time.process_time()
    api.pretrain(file, values["corpus"], folder)
    cpu = {"cpu_seconds": round(time.process_time() - started, 1)}
    (folder / "cost.json").write_text(json.dumps(cpu), encoding="utf-8")


def _compare(
    values: dict[str, Any], folder: Path, task: str, tuning: str, seeds: tuple[int, ...]
) -> None:
    out = folder / f"compare-{task}-{tuning}.json"
    if out.is_file():
        return
    given, how = values["tasks"][task], values["tuning"][tuning]
    console.say(f"{folder.name}: {task}, {tuning}")
    api.compare(
        folder,
        given["task"],
        given["data"],
        valid=given.get("valid"),
        test=given["test"],
        columns=given.get("columns"),
        out=out,
        label_counts=[given["labels"]],
        seeds=seeds,
        lrs=tuple(how["lrs"]),
        steps=how["steps"],
        tuning=tuning,
        jobs=1,
        controls="scratch" not in values["methods"][folder.name],
    )


def _collected(values: dict[str, Any], out: Path) -> dict[str, Any]:
    scores: dict[str, Any] = {}
    for name in values["methods"]:
        for task in values["tasks"]:
            for tuning in values["tuning"]:
                path = out / name / f"compare-{task}-{tuning}.json"
                if path.is_file():
                    arms = json.loads(path.read_text(encoding="utf-8"))["arms"]
                    found = {arm: next(iter(by_count.values())) for arm, by_count in arms.items()}
                    scores.setdefault(name, {}).setdefault(task, {})[tuning] = found
    return scores
