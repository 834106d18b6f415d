"""What `import selfsup` gives: loading, and the verbs of `selfsup.verbs`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfsup.errors import CheckpointError, ConfigError, nearest
from selfsup.model import Model
from selfsup.model_folder import load_model
from selfsup.verbs.distilling import distill
from selfsup.verbs.few_labels import pet, self_train
from selfsup.verbs.learning import finetune, pretrain
from selfsup.verbs.measuring import align, compare, evaluate, probe, prompt
from selfsup.verbs.merging import merge
from selfsup.verbs.pruning import prune
from selfsup.verbs.searching import embed, index_recall, search
from selfsup.verbs.tuned_models import TunedModels

__all__ = [
    "align",
    "compare",
    "distill",
    "embed",
    "evaluate",
    "export",
    "finetune",
    "import_",
    "index_recall",
    "load",
    "load_many",
    "merge",
    "pet",
    "pretrain",
    "probe",
    "prompt",
    "prune",
    "report",
    "search",
    "self_train",
]


def load(run: str | Path, device: str = "auto", settings: dict[str, Any] | None = None) -> Model:
    """Loads a run's model: `.embed`, `.fill`, `.generate`, `.predict`, `.score`, `.anomalies`.

    Args:
        run: a run folder, or its `model/` folder.
        device: auto, cpu or cuda.
        settings: of a fine-tuned run's task: {"task.num_beams": 4}.

    Raises:
        CheckpointError: there is no finished model, or it is damaged.
    """
    return load_model(run, device, settings)


def load_many(
    base: str | Path, runs: Mapping[str, str | Path], device: str = "auto"
) -> TunedModels:
    """Loads one base and many runs tuned from it: `.predict(items, names)` mixes them in a batch.

    Args:
        base: the run folder that the others were tuned from.
        runs: their folders by the names that `predict` is to know: {"mood": "runs/mood-lora"}.
        device: auto, cpu or cuda.

    Raises:
        CheckpointError: a run is not finished, or was tuned from another base.
        ConfigError: a run holds an encoder of its own.
    """
    return TunedModels(base, runs, device)


def report(
    runs: Sequence[str | Path], out: str | Path | None = None, figure: str | Path | None = None
) -> Path:
    """Writes one self-contained HTML page about one run or several.

    Args:
        runs: run folders.
        out: the file; by default report.html in the (first) run folder.
        figure: also draw the first run's comparison as a PNG, for a README.
    """
    from selfsup.reporting import write_figure, write_report

    paths = [Path(run) for run in runs]
    for path in paths:
        if not (path / "run.toml").is_file():
            raise CheckpointError(f"{path}: no run.toml; is it a run folder?")
    if figure is not None:
        write_figure(paths[0] / "compare.json", Path(figure))
    return write_report(paths, Path(out) if out else paths[0] / "report.html")


def import_(source: str | Path, out: str | Path, base: str | Path | None = None) -> Path:
    """Makes a finished run of a published checkpoint; see `interop.transformers`.

    Args:
        source: a folder of `transformers` with safetensors, a name on the Hugging Face Hub, or a
            folder of PEFT: see `interop.peft_import`.
        out: the run folder to make.
        base: for a folder of PEFT: a run of the model that it was trained over.

    Returns:
        the run folder: `finetune`, `compare`, `load` and the others take it as one of their own.
    """
    from selfsup.interop.peft import is_adapter
    from selfsup.interop.peft_import import import_adapter
    from selfsup.interop.transformers import import_run

    if base is not None:
        return import_adapter(source, base, out)
    if is_adapter(source):
        raise ConfigError(f"{source}: an adapter of PEFT: give a run of its model as --base")
    return import_run(source, out)


def export(run: str | Path, out: str | Path, to: str = "transformers") -> Path:
    """Writes a run's model as a checkpoint of another library.

    Args:
        run: a run folder with a transformer of text.
        out: the folder to make.
        to: transformers; or peft: what a run tuned with lora, ia3, prefix or soft_prompt adds.

    Returns:
        the folder.

    Raises:
        ConfigError: the library has no architecture that computes this model.
    """
    from selfsup.interop.peft import export_adapter
    from selfsup.interop.transformers import export_run

    writers = {"transformers": export_run, "peft": export_adapter}
    if to not in writers:
        raise ConfigError(f"cannot export to {to!r}{nearest(to, writers)}")
    return writers[to](run, out)
