"""The tables of names: what can be asked for, and where it lives.

Adding a method is three edits: its file, its line here, its recipe. Modules are imported late, so
reading these tables costs nothing.
"""

import ast
import importlib
import importlib.util
from pathlib import Path
from typing import Any

from selfsup.errors import ConfigError, nearest

DATA = {
    "text": "selfsup.data.text:prepare",
    "image": "selfsup.data.image:prepare",
    "audio": "selfsup.data.audio:prepare",
    "table": "selfsup.data.table:prepare",
    "series": "selfsup.data.series:prepare",
}
MODELS = {
    "bag": "selfsup.models.bag:BagEncoder",
    "elmo": "selfsup.models.elmo:ElmoEncoder",
    "encoder_decoder": "selfsup.models.encoder_decoder:EncoderDecoder",
    "mlp": "selfsup.models.mlp:MLPEncoder",
    "recurrent": "selfsup.models.recurrent:RecurrentEncoder",
    "resnet": "selfsup.models.resnet:ResNetEncoder",
    "transformer": "selfsup.models.transformer:TransformerEncoder",
}
METHODS = {
    "simclr": "selfsup.methods.contrastive.simclr:SimCLR",
    "moco": "selfsup.methods.contrastive.moco:MoCo",
    "wav2vec2": "selfsup.methods.contrastive.wav2vec2:Wav2Vec2",
    "byol": "selfsup.methods.bootstrapping.byol:BYOL",
    "simsiam": "selfsup.methods.bootstrapping.simsiam:SimSiam",
    "barlow_twins": "selfsup.methods.regularized.barlow_twins:BarlowTwins",
    "vicreg": "selfsup.methods.regularized.vicreg:VICReg",
    "rotation": "selfsup.methods.predictive.rotation:Rotation",
    "context_prediction": "selfsup.methods.predictive.context_prediction:ContextPrediction",
    "deepcluster": "selfsup.methods.predictive.deepcluster:DeepCluster",
    "hubert": "selfsup.methods.predictive.hubert:HuBERT",
    "best_rq": "selfsup.methods.predictive.best_rq:BestRQ",
    "replaced_token": "selfsup.methods.predictive.replaced_token:ReplacedToken",
    "word2vec": "selfsup.methods.predictive.word2vec:Word2Vec",
    "autoencoder": "selfsup.methods.autoencoding.autoencoder:Autoencoder",
    "vae": "selfsup.methods.autoencoding.vae:VAE",
    "vqvae": "selfsup.methods.autoencoding.vqvae:VQVAE",
    "context_encoder": "selfsup.methods.generative.context_encoder:ContextEncoder",
    "masked_language": "selfsup.methods.generative.masked_language:MaskedLanguage",
    "causal_language": "selfsup.methods.generative.causal_language:CausalLanguage",
    "bidirectional_language": (
        "selfsup.methods.generative.bidirectional_language:BidirectionalLanguage"
    ),
    "denoising": "selfsup.methods.generative.denoising:Denoising",
    "distilled_language": "selfsup.methods.generative.distilled_language:DistilledLanguage",
    "gpt_bert": "selfsup.methods.generative.gpt_bert:GPTBERT",
    "masked_series": "selfsup.methods.generative.masked_series:MaskedSeries",
    "apc": "selfsup.methods.generative.apc:APC",
    "mockingjay": "selfsup.methods.generative.mockingjay:Mockingjay",
}
TASKS = {
    "classification": "selfsup.tasks.classification:Classification",
    "tagging": "selfsup.tasks.tagging:Tagging",
    "regression": "selfsup.tasks.regression:Regression",
    "span_qa": "selfsup.tasks.span_qa:SpanQA",
    "generation": "selfsup.tasks.generation:Generation",
    "cloze": "selfsup.tasks.cloze:Cloze",
}
TUNINGS = {
    "full": "selfsup.tuning.full:full",
    "probe": "selfsup.tuning.probe:probe",
    "layer_mix": "selfsup.tuning.layer_mix:layer_mix",
    "lora": "selfsup.tuning.lora:lora",
    "adapter": "selfsup.tuning.adapter:adapter",
    "ia3": "selfsup.tuning.ia3:ia3",
    "bias": "selfsup.tuning.bias:bias",
    "prefix": "selfsup.tuning.prefix:prefix",
    "soft_prompt": "selfsup.tuning.soft_prompt:soft_prompt",
    "layer_decay": "selfsup.tuning.layer_decay:layer_decay",
    "unfreezing": "selfsup.tuning.unfreezing:unfreezing",
    "reinit": "selfsup.tuning.reinit:reinit",
    "mixout": "selfsup.tuning.mixout:mixout",
    "r_drop": "selfsup.tuning.r_drop:r_drop",
}
PASSING = ("layer_decay", "unfreezing", "reinit", "mixout", "r_drop")
"""Tunings that act while training alone, after those that let something move; a saved run is loaded
without them."""
# A study is a function that gives what is to be recorded: no class, and no section of a recipe.
STUDIES = {
    "language_methods": "selfsup.studies.language_methods:run",
}
TABLES = {"data": DATA, "models": MODELS, "methods": METHODS, "tasks": TASKS, "tunings": TUNINGS}


def resolve(table: dict[str, str], kind: str, name: str) -> Any:
    """The object behind `name`.

    Raises:
        ConfigError: no such name; the nearest one is given.
    """
    return getattr(module_of(table, kind, name), table[name].partition(":")[2])


def module_of(table: dict[str, str], kind: str, name: str) -> Any:
    """The module that holds `name`; its `Config` is what a configuration section may say."""
    if not isinstance(name, str) or name not in table:
        raise ConfigError(f"unknown {kind} {name!r}{nearest(str(name), table)}")
    return importlib.import_module(table[name].partition(":")[0])


def summary(target: str) -> str:
    """The first line of a module's docstring, read without importing it."""
    name = target.partition(":")[0]
    path = Path(__file__).parent.joinpath(*name.split(".")[1:]).with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0].rstrip(".")


def recipe_paths() -> dict[str, Path]:
    """The named recipes: one TOML file each."""
    folder = Path(__file__).parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def suite_paths() -> dict[str, Path]:
    """The named suites of tasks: one TOML file each."""
    folder = Path(__file__).parent / "suites"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}
