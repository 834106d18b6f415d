"""Merging: a run that was tuned over a base becomes one that needs no base.

Where all that was added can be put into the encoder's weights (lora, ia3, bias), it is, and the run
is as fast as its base. Where it cannot (adapters, prefixes, prompts), the run carries it beside the
encoder's weights.
"""

from contextlib import closing
from pathlib import Path
from typing import Any

from selfsup import console, environment
from selfsup.config import read_toml, write_toml
from selfsup.errors import ConfigError
from selfsup.files import write_text
from selfsup.model_folder import load_model, save_model
from selfsup.training.folder import RunFolder
from selfsup.tuning import parts


def merge(run: str | Path, out: str | Path) -> Path:
    """Makes a whole run of one that names a base.

    Args:
        run: a run folder.
        out: the run folder to make.

    Returns:
        the run folder.

    Raises:
        ConfigError: the run needs no base as it is.
        CheckpointError: the base is not there, or is another one.
    """
    model = load_model(run, "cpu")
    if "base" not in model.values:
        raise ConfigError(f"{run}: needs no base: it holds all of its weights already")
    encoder = model.objective.encoder
    added = parts.additions_of(parts.innermost(encoder))
    kinds = {kind for _, kind, _ in added.every(parts.OWN)} if parts.OWN in added else set()
    shown = " and ".join(sorted(kinds)) or "nothing"
    tuning = model.values["tuning"]
    try:
        if kinds:
            parts.merge(encoder)
        gone = kinds
        tuning = {k: v for k, v in tuning.items() if k not in gone}
        tuning["names"] = [name for name in tuning["names"] if name not in gone]
        console.say(f"merged into the encoder's weights: {shown}; nothing is left beside them")
    except ConfigError as error:
        console.say(f"{shown} stays beside the encoder's weights ({error}); the base is not needed")
    left_out = ("format", "sha256", "base")
    sections: dict[str, Any] = {k: v for k, v in model.values.items() if k not in left_out}
    sections["tuning"] = tuning
    with closing(RunFolder(Path(out))) as folder:
        save_model(folder.path / "model", model.objective, sections, model.preprocessor)
        values = read_toml(Path(run) / "run.toml")
        values["merged"] = {"run": str(run)}
        command = {**values.get("command", {}), "line": environment.command_line()}
        number = sum(p.numel() for p in model.objective.parameters())
        facts = {**values.get("facts", {}), "parameters": number}
        written = write_toml({**values, "command": command, "facts": facts})
        write_text(folder.path / "run.toml", written)
    return folder.path
