"""A checkpoint folder of `transformers`: found or fetched, read, its tensors named alike.

Only safetensors are read: any other format can run code. Names differ with the class that wrote
them (a base model has no prefix) and with its age; here they become those of a model with a head.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selfsup.errors import CheckpointError, ConfigError
from selfsup.interop import tokenizers as tokens
from selfsup.interop.configurations import family_of
from selfsup.interop.family import Family
from selfsup.training.checkpoint import load_tensors

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# of normalisations, in checkpoints from before 2019
AGED = re.compile(r"(?<=\.)(gamma|beta)$")
AGED_NAMES = {"gamma": "weight", "beta": "bias"}


class Checkpoint(NamedTuple):
    """A folder of `transformers`, read: its tensors have the names of a model with a head."""

    family: Family
    values: dict[str, Any]  # of config.json
    tensors: dict[str, Tensor]
    where: str  # the weights' path, for errors
    tied: bool  # the output's weights are the token table

    @property
    def config(self) -> str:
        """The path of config.json, for errors."""
        return str(Path(self.where).with_name("config.json"))

    @property
    def scaled(self) -> bool:
        """Whether the output of T5 or Switch is divided by sqrt(dim)."""
        tied = self.values.get("tie_word_embeddings", True) is not False
        return bool(self.values.get("scale_decoder_outputs", tied))


def fetched(name: str) -> Path:
    """The folder of a model of the Hugging Face Hub, from its cache or the network."""
    if not HUB_NAME.fullmatch(name):
        raise ConfigError(f"{name}: there is no such folder")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigError(
            f"{name}: there is no such folder, and fetching it from the Hugging Face Hub needs "
            "huggingface_hub: pip install 'selfsup[hub]'"
        ) from None
    wanted = ["*.json", "*.safetensors", "vocab.txt", "merges.txt", *tokens.PIECES]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # of the network, the Hub, the cache: many kinds
        reason = str(error).strip().splitlines()
        raise ConfigError(
            f"{name}: there is no such folder, and the Hugging Face Hub did not give it "
            f"({reason[0] if reason else type(error).__name__}). Offline, fetch it elsewhere and "
            "give the folder with config.json, model.safetensors and the tokenizer"
        ) from error


def read_folder(path: Path) -> Checkpoint:
    """Reads config.json and the weights.

    Raises:
        ConfigError: a file is missing, of another family, or a pickle.
        CheckpointError: the weights are damaged or not finite, or some that must repeat others do
            not.
    """
    where = path / "config.json"
    try:
        values = json.loads(where.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"{where}: not a JSON file ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: must hold an object")
    family = family_of(values, str(where))
    tensors, file = _read_tensors(path)
    tensors = _named(family, tensors)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{file}: {name} holds numbers that are not finite")
    tied = _drop_repeated(family, tensors, str(file))
    return Checkpoint(family, values, tensors, str(file), tied)


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], Path]:
    """All tensors of a folder, and the file that errors name."""
    if (path / WEIGHTS).is_file():
        return load_tensors(path / WEIGHTS), path / WEIGHTS
    if (path / INDEX).is_file():
        try:
            index = json.loads((path / INDEX).read_text(encoding="utf-8"))
            names = {str(name) for name in index["weight_map"].values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path / INDEX}: not an index of shards ({error!r})") from error
        out: dict[str, Tensor] = {}
        for name in sorted(names):
            if Path(name).name != name or not (path / name).is_file():
                raise CheckpointError(f"{path / INDEX}: the shard {name} is missing")
            out |= load_tensors(path / name)
        return out, path / INDEX
    pickled = [file.name for pattern in PICKLED for file in sorted(path.glob(pattern))]
    if pickled:
        raise ConfigError(
            f"{path / pickled[0]}: a file of this kind can run code as it is read, so only "
            "safetensors are. Where you trust it, convert it with transformers: "
            f"AutoModel.from_pretrained({str(path)!r}).save_pretrained(FOLDER), with the class "
            'that config.json names under "architectures"'
        )
    raise ConfigError(f"{path}: there is neither {WEIGHTS} nor {INDEX}")


def _named(family: Family, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, named as in a model with a head; those that hold no numbers left out."""
    renamed = {
        AGED.sub(lambda found: AGED_NAMES[found[1]], name): tensor
        for name, tensor in tensors.items()
        if not name.endswith(family.dropped or ("\0",))
    }
    if any(name.startswith(family.prefix) for name in renamed):
        return renamed
    return {family.prefix + name: tensor for name, tensor in renamed.items()}


def _drop_repeated(family: Family, tensors: dict[str, Tensor], where: str) -> bool:
    """Takes out tensors that repeat others; whether the output's weights do."""
    for name, other in family.tied.items():
        repeated = tensors.pop(name, None)
        if repeated is None:
            continue
        if other not in tensors:
            tensors[other] = repeated
        elif not torch.equal(tensors[other], repeated):
            raise CheckpointError(f"{where}: {name} differs from {other}; only tied ones are read")
    zeros = tensors.pop("final_logits_bias", None)
    if zeros is not None and zeros.any():
        raise CheckpointError(f"{where}: final_logits_bias is not zero; ours has no place for it")
    if "lm_head.weight" in tensors and "shared.weight" in tensors:
        if not torch.equal(tensors["lm_head.weight"], tensors["shared.weight"]):
            return False
        del tensors["lm_head.weight"]
    return True
