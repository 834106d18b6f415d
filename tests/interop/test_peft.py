"""Folders of PEFT out and in: what they compute, and what is refused."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import tokenizers as library
import torch
from safetensors.torch import load_file, save_file
from tokenizers import models, pre_tokenizers, processors
from torch import Tensor, nn

import selfsup
from selfsup.data.labels import Labelled
from selfsup.errors import CheckpointError, ConfigError
from selfsup.evaluation.adapt import new_task
from selfsup.interop import adapters
from selfsup.interop.peft import export_adapter
from selfsup.interop.peft_import import import_adapter
from selfsup.interop.transformers import export_run, import_run
from selfsup.model_folder import Base, load_model, save_model
from selfsup.randomness import isolated, torch_generator
from selfsup.tasks import classification, tagging
from selfsup.tuning.choice import Tuning, tune

peft = pytest.importorskip("peft")
# PEFT asks transformers 5 by an old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 26,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 26}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
T5 |= {"relative_attention_max_distance": 20, "relative_attention_num_buckets": 8}
T5 |= {"decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu"}
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(56))]


def spread(module: nn.Module, seed: str, std: float) -> None:
    generator = torch_generator(0, seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=std)


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Runs of BERT, GPT-2 and T5, and what they are exported as."""
    import transformers

    folder, out = tmp_path_factory.mktemp("bases"), {}
    for name, cls, values in (
        ("bert", "BertModel", BERT),
        ("gpt2", "GPT2LMHeadModel", GPT2),
        ("t5", "T5ForConditionalGeneration", T5),
    ):
        given = folder / name
        given.mkdir()
        if name == "bert":
            size = len(PIECES)
            (given / "vocab.txt").write_text("\n".join(PIECES) + "\n")
        elif name == "t5":
            pieces = ["<pad>", "</s>", "<unk>", *(f"word{i}" for i in range(56)), "<extra_id_0>"]
            wrapped = library.Tokenizer(
                models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="<unk>")
            )
            wrapped.pre_tokenizer = pre_tokenizers.Whitespace()
            wrapped.add_special_tokens(["<pad>", "</s>", "<unk>", "<extra_id_0>"])
            wrapped.post_processor = processors.TemplateProcessing(
                single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
            )
            wrapped.save(str(given / "tokenizer.json"))
            size = len(pieces)
        else:
            pieces = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
            wrapped = library.Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, []))
            wrapped.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            wrapped.add_special_tokens(["<|endoftext|>"])
            wrapped.save(str(given / "tokenizer.json"))
            size = len(pieces)
        kind = getattr(transformers, cls)
        with isolated():
            torch.manual_seed(0)
            model = kind(kind.config_class(vocab_size=size, **values))
        spread(model, "base", 0.1)
        model.save_pretrained(given)
        run = import_run(given, folder / f"{name}-run")
        out[name] = run, export_run(run, folder / f"{name}-exported")
    return out


def tuned(folder: Path, base: Path, task: str | None, tuning: str, options: dict) -> Path:
    """A tuned run as `selfsup finetune` leaves it, its parameters drawn."""
    start, chosen = load_model(base, "cpu"), Tuning.of(tuning, options)
    if task is None:
        built = copy.deepcopy(start.objective)
        tune(built, chosen)
        sections = {"method": start.values["method"]}
    else:
        module = {"classification": classification, "tagging": tagging}[task]
        config = module.Config(**({"pooling": "encoder"} if task == "classification" else {}))
        labelled = Labelled(task, ["word1"], ["a"], ("a", "b", "c"), "here")
        built = new_task(start.encoder, task, config, labelled, tuning=chosen, seed=0)
        spread(built.head, "head", 0.3)
        section = {"pooling": "encoder"} if task == "classification" else {}
        sections = {"task": {"name": task, **section}, "labels": {"names": ["a", "b", "c"]}}
    spread(built.encoder.additions, "parts", 0.2)
    sections |= {"data": start.values["data"], "model": start.values["model"]}
    sections |= {"tuning": chosen.values()}
    save_model(folder / "model", built, sections, start.preprocessor, Base(base, start))
    return folder


def batch_of(size: int) -> dict[str, Tensor]:
    tokens = torch.randint(5, size, (3, 9), generator=torch_generator(0, "tokens"))
    return {"tokens": tokens, "mask": torch.arange(9) < torch.tensor([[9], [7], [2]])}


def close(got: Tensor, expected: Tensor) -> None:
    atol = 1e-5 * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(got, expected, rtol=0, atol=atol, check_dtype=False)


def agrees(run: Path, theirs: nn.Module, batch: dict[str, Tensor]) -> None:
    """The same logits where the head is theirs too, else the same hidden states.

    In float64: drawn adapters make scores of hundreds, and their softmax float32's rounding larger.
    """
    ours, theirs = load_model(run, "cpu").objective.double(), theirs.double()
    features, real = ours.encoder(batch), batch["mask"]
    if hasattr(ours.encoder, "decode"):
        target = batch["tokens"].flip(0)
        shifted = ours.encoder.shifted(target)
        out = theirs.eval()(input_ids=batch["tokens"], attention_mask=real.long(), labels=target)
        close(ours.encoder.logits(ours.encoder.decode(shifted, features).last), out.logits)
        return
    given = {"input_ids": batch["tokens"], "attention_mask": real.long()}
    out = theirs.eval()(**given, output_hidden_states=True)
    if isinstance(ours, classification.Classification) and "logits" in out:
        close(ours.read(features), out.logits)
    elif isinstance(ours, tagging.Tagging) and "logits" in out:
        close(ours.read(features)[real], out.logits[:, -9:][real])
    elif "logits" in out and run.name != "masked":
        close(ours.head(features.last, ours.encoder.embedding)[real], out.logits[:, -9:][real])
    else:
        hidden = out.get("last_hidden_state")
        hidden = out.hidden_states[-1] if hidden is None else hidden
        close(features.last[real], hidden[:, -9:][real])


AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
    None: "AutoModelForMaskedLM",
}
SHIFTED = {"shift_positions": True, "length": 3}
EXPORTS = {
    "classifier": ("bert", "classification", "lora", {"dropout": 0.1}, "SEQ_CLS"),
    "tagger": ("bert", "tagging", "lora", {"targets": ["all"], "rank": 2}, "TOKEN_CLS"),
    "pooler": ("bert", "classification", "lora", {"targets": ["query", "pooler"]}, "SEQ_CLS"),
    "fused": ("bert", "tagging", "lora", {"targets": ["qkv", "value", "down"]}, "TOKEN_CLS"),
    "masked": ("bert", None, "lora", {"alpha": 3.0}, None),
    "writer": ("gpt2", None, "lora", {"targets": ["query", "value", "up"]}, "CAUSAL_LM"),
    "feature": ("gpt2", "classification", "lora", {"targets": ["qkv"]}, "FEATURE_EXTRACTION"),
    "factors": ("bert", "classification", "ia3", {}, "SEQ_CLS"),
    "both": ("t5", None, "lora", {"targets": ["all"], "rank": 3}, "SEQ_2_SEQ_LM"),
    "both-factors": ("t5", None, "ia3", {}, "SEQ_2_SEQ_LM"),
    "fused-factors": ("gpt2", None, "ia3", {}, "CAUSAL_LM"),
    "prefix": ("gpt2", None, "prefix", {"shift_positions": True, "projection": 6}, "CAUSAL_LM"),
    "prefix-classifier": ("bert", "classification", "prefix", SHIFTED, "SEQ_CLS"),
    "prefix-tagger": ("bert", "tagging", "prefix", SHIFTED, "TOKEN_CLS"),
    "prompt": ("gpt2", None, "soft_prompt", {"length": 4}, "CAUSAL_LM"),
    "bert-prompt": ("bert", "tagging", "soft_prompt", {"length": 4}, "FEATURE_EXTRACTION"),
}


@pytest.mark.parametrize("case", EXPORTS)
def test_peft_loads_what_is_exported_and_it_comes_back(bases, tmp_path, case):
    import transformers

    name, task, tuning, options, task_type = EXPORTS[case]
    base, exported = bases[name]
    run = tuned(tmp_path / case, base, task, tuning, {tuning: options})
    folder = export_adapter(run, tmp_path / "adapter")
    assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == task_type
    more = {"num_labels": 3} if task_type in ("SEQ_CLS", "TOKEN_CLS") else {}
    with isolated():  # a fresh head is drawn
        model = getattr(transformers, AUTO[task_type]).from_pretrained(exported, **more)
        theirs = peft.PeftModel.from_pretrained(model, folder)
    batch = batch_of(model.config.vocab_size)
    agrees(run, theirs, batch)
    back = load_model(import_adapter(folder, base, tmp_path / "back"), "cpu").objective
    first, again = (one.encoder(batch) for one in (load_model(run, "cpu").objective, back))
    close(again.last[batch["mask"]], first.last[batch["mask"]])
    if more:
        assert type(back).__name__ == {"SEQ_CLS": "Classification"}.get(task_type, "Tagging")
        close(back.head.weight, load_model(run, "cpu").objective.head.weight)
    plain = load_model(base, "cpu").encoder(batch)
    assert not torch.allclose(first.last, plain.last, atol=1e-2)


IMPORTS = {
    "ranks": (
        "bert",
        "SEQ_CLS",
        "LoraConfig",
        {"r": 2, "lora_alpha": 3, "target_modules": ["query", "key", "intermediate.dense"]}
        | {"rank_pattern": {"layer.1.attention.self.query": 4}, "use_rslora": True}
        | {"alpha_pattern": {"key": 7}},
    ),
    "all layers": ("bert", "SEQ_CLS", "LoraConfig", {"r": 2, "target_modules": "all-linear"}),
    "prefix": ("bert", "SEQ_CLS", "PrefixTuningConfig", {"num_virtual_tokens": 3}),
    "prompt": ("bert", "TOKEN_CLS", "PromptTuningConfig", {"num_virtual_tokens": 3}),
    "one layer": (
        "bert",
        None,
        "LoraConfig",
        {"r": 2, "target_modules": ["value"], "layers_to_transform": [1]},
    ),
    "all factors": ("bert", "TOKEN_CLS", "IA3Config", {}),
    "queries": ("gpt2", "CAUSAL_LM", "IA3Config", {}),
    "writer": ("gpt2", "CAUSAL_LM", "LoraConfig", {"r": 3, "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("case", IMPORTS)
def test_what_peft_saved_is_imported(bases, tmp_path, case):
    import transformers

    name, task_type, config, options = IMPORTS[case]
    base, exported = bases[name]
    more = {"num_labels": 3} if task_type in ("SEQ_CLS", "TOKEN_CLS") else {}
    with isolated(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it sets fan_in_fan_out itself
        model = getattr(transformers, AUTO[task_type]).from_pretrained(exported, **more)
        chosen = getattr(peft, config)(task_type=task_type, **options)
        theirs = peft.get_peft_model(model, chosen)
    generator = torch_generator(0, "adapter")
    for parameter in (p for p in theirs.parameters() if p.requires_grad):
        nn.init.uniform_(parameter, 0.1, 0.6, generator=generator)
    theirs.save_pretrained(tmp_path / "adapter")
    out = tmp_path / ("masked" if task_type is None else "run")
    run = selfsup.import_(tmp_path / "adapter", out, base=base)
    agrees(run, theirs, batch_of(model.config.vocab_size))
    assert (run / "run.toml").is_file()
    text = ["word1 word3"] if name == "bert" else ["a text"]
    loaded = selfsup.load(run, "cpu")
    if more:
        assert loaded.names == ("LABEL_0", "LABEL_1", "LABEL_2")
        assert loaded.predict(text)
    assert loaded.embed(text).shape == (1, 32)


def damaged(folder: Path, **config) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def renamed(folder: Path, before: str, after: str) -> Path:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name.replace(before, after): x.clone() for name, x in tensors.items()}, path)
    return folder


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        (lambda f: damaged(f, peft_type="LOHA"), ConfigError, "peft_type = 'LOHA'; LORA, IA3"),
        (lambda f: damaged(f, use_dora=True), ConfigError, "use_dora = True is not supported"),
        (lambda f: damaged(f, bias="all"), ConfigError, "bias = 'all'"),
        (lambda f: (f / "adapter_config.json").unlink(), ConfigError, "no adapter_config.json"),
        (lambda f: (f / "adapter_config.json").write_text("{"), ConfigError, "not a JSON file"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), ConfigError, "there is no adapter_"),
        (
            lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
            ConfigError,
            "can run code",
        ),
        (lambda f: renamed(f, "layer.1.", "layer.7."), ConfigError, "no such linear layer"),
        (lambda f: renamed(f, "bert.", "other."), ConfigError, "none of its layers is one of"),
        (lambda f: renamed(f, "lora_B", "lora_C"), ConfigError, "lora_C.weight, which ours has no"),
        (
            lambda f: renamed(f, "layer.1.attention.self.value.lora_B", "more.lora_B"),
            CheckpointError,
            "does not fit",
        ),
    ],
)
def test_bad_adapters_are_refused_by_name(bases, tmp_path, change, error, word):
    base, _ = bases["bert"]
    run = tuned(tmp_path / "run", base, "tagging", "lora", {})
    folder = export_adapter(run, tmp_path / "adapter")
    change(folder)
    with pytest.raises(error, match=word):
        import_adapter(folder, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_classifier_over_a_prompt_is_refused(bases, tmp_path):
    import transformers

    base, exported = bases["bert"]
    with isolated():
        model = transformers.AutoModelForSequenceClassification.from_pretrained(exported)
        chosen = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
        peft.get_peft_model(model, chosen).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="reads the first vector of the prompt"):
        import_adapter(tmp_path / "adapter", base, tmp_path / "out")


def test_bad_input(bases, tmp_path):
    base, exported = bases["bert"]
    run = tuned(tmp_path / "run", base, "tagging", "lora", {})
    folder = export_adapter(run, tmp_path / "adapter")
    with pytest.raises(ConfigError, match="give a run of its model as --base"):
        selfsup.import_(folder, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"no adapter_config\.json"):
        selfsup.import_(exported, tmp_path / "out", base=base)
    with pytest.raises(ConfigError, match="none of its layers is one of"):
        import_adapter(folder, bases["gpt2"][0], tmp_path / "out")
    with pytest.raises(ConfigError, match="exists already"):
        export_adapter(run, folder)
    with pytest.raises(ConfigError, match="adds nothing to a base"):
        export_adapter(base, tmp_path / "other")
    with pytest.raises(ConfigError, match="holds lora beside"):
        export_run(run, tmp_path / "other")
    several = tuned(tmp_path / "several", base, "tagging", "lora+bias", {})
    with pytest.raises(ConfigError, match=r"tuned with lora\+bias; a folder of PEFT holds one of"):
        export_adapter(several, tmp_path / "other")
    with pytest.raises(ConfigError, match="LoRA on pooler: their model has no such linear layer"):
        adapters.write_lora({"pooler": None}, {})
    both = tuned(tmp_path / "both", bases["t5"][0], None, "soft_prompt", {})
    with pytest.raises(ConfigError, match="a soft prompt of an encoder-decoder"):
        export_adapter(both, tmp_path / "other")
    both = tuned(tmp_path / "two", bases["t5"][0], None, "prefix", {})
    with pytest.raises(ConfigError, match="an encoder-decoder has two"):
        export_adapter(both, tmp_path / "other")
    prefix = tuned(tmp_path / "prefix", base, "tagging", "prefix", {})
    with pytest.raises(ConfigError, match=r"tuning\.prefix.shift_positions=true"):
        export_adapter(prefix, tmp_path / "other")
    assert not (tmp_path / "other").exists()
