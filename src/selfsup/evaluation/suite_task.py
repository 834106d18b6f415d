"""One task of a suite: its rate chosen on a part of training, its metrics, its submission.

A fifth of the training part, at most 1,000 questions, is kept back and chooses the learning rate,
with the first seed; the part that is scored chooses nothing. A task that is done is kept in a file
and not done again; then nothing that decides its score may have changed.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from selfsup import console, registry
from selfsup.data.labels import Labelled, split, subset
from selfsup.errors import ConfigError, DivergedError
from selfsup.evaluation import submission, suite_files, suite_plan
from selfsup.evaluation.adapt import default_training, fit, new_task, num_rows
from selfsup.evaluation.metrics import METRICS
from selfsup.evaluation.suite_files import LAYOUTS, Question, Questions
from selfsup.evaluation.suite_plan import Part, SuiteTask
from selfsup.files import write_json
from selfsup.model import Model

CHOOSING = 0.2  # share of the training part that chooses the learning rate
MAX_CHOOSING = 1000  # questions
LEAST_TO_SPLIT = 20  # of fewer questions none is kept back: the default learning rate is taken
FACTORS = (1.0, 0.5, 2.0)  # of the default learning rate; equal scores take the first
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How each task is learned.

    Attributes:
        labels: training questions of each task, those that choose among them; None: all.
        seeds: each draws other initial weights and another order, and with `labels` other ones.
        lrs: peak learning rates to choose from; (): `adapt.default_training`, half and twice of it.
        steps: optimizer steps; None: `adapt.default_training`.
        tuning: names of `registry.TUNINGS` as `Tuning.of` reads them.
        max_length: longest item (a text in tokens); None: what the task says, or 128.
    """

    labels: int | None = None
    seeds: tuple[int, ...] = (0,)
    lrs: tuple[float, ...] = ()
    steps: int | None = None
    tuning: str = "full"
    max_length: int | None = None

    def __post_init__(self) -> None:
        for name in ("labels", "steps", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds must be given and differ, got {list(self.seeds)}")
        if any(lr <= 0 for lr in self.lrs):
            raise ConfigError(f"learning rates must be above 0, got {list(self.lrs)}")


def answers(model: Model, layout: str, questions: Sequence[Question]) -> list[Any]:
    """The answer to each question, of the form of its truth.

    Args:
        model: a fine-tuned one; for choices its classes are "0", wrong, and "1", right.
        layout: a name of `suite_files.LAYOUTS`: how the choices of a question come to one answer.
        questions: what is asked.
    """
    items = [item for question in questions for item in question.items]
    answer = LAYOUTS[layout].answer
    if answer == "label":
        return model.predict(items)
    if answer == "each":
        values: list[Any] = model.predict(items)
    else:
        right = model.names.index("1")
        values = [float(shares[right]) for shares in model.predict_proba(items)]
    out: list[Any] = []
    end = 0
    for question in questions:
        mine = values[end : end + len(question.items)]
        end += len(mine)
        out.append(mine if answer == "each" else question.options[mine.index(max(mine))])
    return out


class TaskRun:
    """One task of a suite on one run.

    Args:
        model: the pre-trained run.
        name: the task's name in the suite.
        task: what it says of it.
        data: the folder of the suite's files.
        out: the folder of the suite's results.
        settings: how it is learned.
    """

    def __init__(
        self, model: Model, name: str, task: SuiteTask, data: Path, out: Path, settings: Settings
    ):
        self.model, self.name, self.task = model, name, task
        self.data, self.out, self.settings = data, out, settings
        self.kind = str(model.values["data"]["name"])
        self.preprocessor = model.preprocessor.limited(
            settings.max_length or task.max_length or None
        )
        train = suite_plan.find(data, task.train.file)
        scored = {
            key: suite_plan.find(data, part.file, but=train) for key, part in task.scored.items()
        }
        self.files = {"train": train, **scored}
        hidden = {key: suite_plan.find(data, part.file) for key, part in task.hidden.items()}
        self.hidden = {key: path for key, path in hidden.items() if path}

    def result(self) -> dict[str, Any]:
        """What suite.json says of the task, from its own file where it is done already."""
        about = {"title": self.task.title or self.name, "task": self.task.task}
        needed = ["train", *(key for key, part in self.task.scored.items() if part.counts)]
        lacking = [self._part(key).file[0] for key in needed if self.files[key] is None]
        if lacking:
            console.say(f"  missing: {', '.join(lacking)}")
            return {**about, "state": "missing", "missing": lacking}
        done = self.out / "tasks" / f"{self.name}.json"
        made_by = self._made_by()
        if done.is_file():
            found = json.loads(done.read_text(encoding="utf-8"))
            _check_same(done, found["made_by"], made_by)
            console.say("  done already")
            return found["result"]
        started = time.monotonic()
        try:
            result = {**about, "state": "done", **self._measured()}
        except ConfigError as error:  # this run's kind of data or network cannot do such a task
            console.warn(f"{self.name}: {error}")
            return {**about, "state": "not supported", "why": str(error)}
        result["seconds"] = round(time.monotonic() - started, 1)
        write_json(done, {"made_by": made_by, "result": result})
        return result

    def _part(self, key: str) -> Part:
        return self.task.train if key == "train" else self.task.scored[key]

    def _made_by(self) -> dict[str, Any]:
        """All that decides the scores, as JSON has it."""
        found = {
            "format": FORMAT,
            "settings": asdict(self.settings),
            "weights": self.model.values.get("sha256", {}),
            "task": asdict(self.task),
            "files": {
                str(path.relative_to(self.data)): path.stat().st_size
                for path in [*self.files.values(), *self.hidden.values()]
                if path
            },
        }
        return json.loads(json.dumps(found))

    def _read(self, path: Path, part: Part, classes: Sequence[str], hidden: bool) -> Questions:
        columns = (part.text, part.text_b, "" if hidden else part.label)
        task = self.task
        found = suite_files.read(
            path, task.layout, task.task, columns, classes, kind=self.kind, hidden=hidden
        )
        if found.left_out:
            console.warn(f"{path}: {found.left_out:,} lines without a label or a cell are left out")
        return found

    def _measured(self) -> dict[str, Any]:
        train_path = self.files["train"]
        assert train_path is not None
        train = self._read(train_path, self.task.train, self.task.classes, False)
        scored = {
            key: self._read(path, part, train.names, False)
            for key, part in self.task.scored.items()
            if (path := self.files[key])
        }
        tuned, rates, kept = self._choose(train)
        metrics: dict[str, list[float]] = {}
        for seed in self.settings.seeds:
            model = tuned or self._fit(self._parts(train, seed)[0], train, rates[0], seed)
            for name, value in self._metrics(scored, partial(self._guesses, model)).items():
                metrics.setdefault(name, []).append(value)
            if seed == self.settings.seeds[0]:
                submitted = self._submit(model, train.names)
            tuned = None
        seeds = range(len(self.settings.seeds))
        return {
            "metrics": metrics,
            "counted": list(self.task.counted),
            "score": [
                self.task.score({name: values[seed] for name, values in metrics.items()})
                for seed in seeds
            ],
            "majority": self._majority(train, scored),
            "examples": {key: len(part.rows) for key, part in scored.items()},
            "files": {
                key: str(path.relative_to(self.data)) for key, path in self.files.items() if path
            },
            "train_examples": kept[0],
            "choosing_examples": kept[1],
            "learning_rate": rates[0],
            "left_out": {
                part.source: part.left_out for part in (train, *scored.values()) if part.left_out
            },
            "no_data_for": [key for key in self.task.scored if key not in scored],
            "submission": submitted,
        }

    def _choose(self, train: Questions) -> tuple[Model | None, list[float], tuple[int, int]]:
        """The first seed's model with its learning rate, and how many questions made and chose it.

        No model where there is nothing to choose.
        """
        learning, choosing = self._parts(train, self.settings.seeds[0])
        default = default_training(len(learning), self.model.encoder.dim, self.task.task).lr
        rates = list(self.settings.lrs or (default * factor for factor in FACTORS))
        counts = len(learning), len(choosing)
        if not choosing:
            return None, rates[:1], counts
        best: tuple[float, Model | None, float] = (-float("inf"), None, 0.0)
        for lr in rates:
            try:
                model = self._fit(learning, train, lr, self.settings.seeds[0])
            except DivergedError as error:
                if lr == min(rates):
                    raise
                console.say(f"  learning rate {lr:.3g}: {error}")
                continue
            value = self._chosen_by(model, choosing)
            console.say(f"  learning rate {lr:.3g}: {value:.3f} on {len(choosing)} that choose it")
            if value > best[0]:
                best = (value, model, lr)
        return best[1], [best[2]], counts

    def _parts(self, train: Questions, seed: int) -> tuple[list[Question], list[Question]]:
        """Questions to learn from and, where a rate is to be chosen, questions that choose it."""
        labels = [str(row.truth) for row in train.rows]
        plain = self.task.task == "classification" and LAYOUTS[self.task.layout].answer == "label"
        whole = Labelled(
            "classification" if plain else "regression",  # only classes keep their shares
            train.rows,
            labels,
            (),
            train.source,
            tuple(row.group for row in train.rows),
        )
        if self.settings.labels and self.settings.labels < len(whole):
            whole = subset(whole, self.settings.labels, seed)
        if len(self.settings.lrs) == 1 or len(set(whole.groups)) < LEAST_TO_SPLIT:
            return whole.items, []
        share = min(CHOOSING, MAX_CHOOSING / len(whole))
        learning, choosing = split(whole, (1 - share, share), seed)
        return learning.items, choosing.items

    def _fit(self, learning: list[Question], train: Questions, lr: float, seed: int) -> Model:
        name = self.task.task
        labelled = suite_files.as_labelled(learning, name, train.names, train.source)
        count = num_rows(self.preprocessor, labelled)
        training = default_training(count, self.model.encoder.dim, name)
        steps = self.settings.steps or training.steps
        training = replace(training, seed=seed, lr=lr, steps=steps)
        config = registry.module_of(registry.TASKS, "task", name).Config()
        task = new_task(
            self.model.encoder, name, config, labelled, tuning=self.settings.tuning, seed=seed
        )
        with console.quiet():
            fit(task, self.preprocessor, labelled, training, title=self.name)
        return Model(task, self.preprocessor, train.names, {"task": {"name": name}})

    def _guesses(self, model: Model, questions: Sequence[Question]) -> list[Any]:
        return answers(model, self.task.layout, questions)

    def _metrics(
        self, scored: dict[str, Questions], guesses_of: Callable[[list[Question]], list[Any]]
    ) -> dict[str, float]:
        found = {}
        for key, part in scored.items():
            truth, guess = [row.truth for row in part.rows], guesses_of(part.rows)
            for metric in self.task.scored[key].metrics:
                found[self.task.metric_name(key, metric)] = METRICS[metric](truth, guess)
        return found

    def _chosen_by(self, model: Model, choosing: list[Question]) -> float:
        truth, guess = [row.truth for row in choosing], self._guesses(model, choosing)
        return fmean(METRICS[metric](truth, guess) for metric in self.task.metrics)

    def _majority(self, train: Questions, scored: dict[str, Questions]) -> float | None:
        """The score of always giving the most frequent class; None where there are no classes."""
        if self.task.task != "classification" or LAYOUTS[self.task.layout].answer != "label":
            return None
        most = Counter(row.truth for row in train.rows).most_common(1)[0][0]
        return self.task.score(self._metrics(scored, lambda rows: [most] * len(rows)))

    def _submit(self, model: Model, names: tuple[str, ...]) -> list[str]:
        """Writes the predictions for every hidden part; gives the names of the files."""
        for name, path in self.hidden.items():
            questions = self._read(path, self.task.hidden[name], names, True).rows
            guesses = self._guesses(model, questions)
            place = self.out / "submission" / name
            submission.write(place, self.task.layout, questions, guesses, self.task.range)
        return list(self.hidden)


def _check_same(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [key for key in now if before.get(key) != now[key]]
    if not changed:
        return
    shown = changed[0]
    if isinstance(now[shown], dict) and isinstance(before.get(shown), dict):
        keys = [key for key in now[shown] if before[shown].get(key) != now[shown][key]]
        shown += f" ({', '.join(keys)})" if keys else ""
    raise ConfigError(
        f"{path}: was made with other {shown}; give another --out, or remove the file to have the "
        "task done again"
    )
