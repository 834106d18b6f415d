"""Checkpoints in and out, held against `transformers` number for number."""

import json
from pathlib import Path

import pytest
import tokenizers as library
import torch
from safetensors.torch import load_file, save_file
from tokenizers import models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

import selfsup
from selfsup.errors import CheckpointError, ConfigError, DataError
from selfsup.interop.transformers import export_run, import_run
from selfsup.models.view import Cache
from selfsup.randomness import isolated, torch_generator

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "it", "un", "##happy", "##ness", "dog"]
WORDS += ["世", "界", "😀", ",", ".", "!"]
BERT_PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
TEXTS = ["The cat, un-happiness!", "unhappy 世界 on the mat.", "😀 a dog 😀", "été"]
SIZE = 61


def randomised(model: nn.Module) -> nn.Module:
    """Every weight random, biases and norms too, so that none can be left out unnoticed."""
    generator = torch_generator(0, "weights")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


def close(got: Tensor, expected: Tensor) -> None:
    """Equal to 1e-5, of the largest number where that is above 1."""
    atol = 1e-5 * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def write_wordpiece(folder: Path, size: int = SIZE) -> None:
    """A vocab.txt, as the first checkpoints came with."""
    pieces = BERT_PIECES + [f"word{i}" for i in range(size - len(BERT_PIECES))]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")


def byte_bpe(special: list[str]) -> library.Tokenizer:
    """A byte-level BPE without merges but some, its special tokens first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*special, *alphabet, "th", "the", "Ġthe", "at"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "t")]
    wrapped = library.Tokenizer(models.BPE(vocabulary, merges))
    wrapped.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    wrapped.decoder = library.decoders.ByteLevel()
    wrapped.add_special_tokens(special)
    return wrapped


def write_roberta_bpe(folder: Path) -> int:
    wrapped = byte_bpe(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    wrapped.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    wrapped.save(str(folder / "tokenizer.json"))
    return wrapped.get_vocab_size()


def write_gpt2_bpe(folder: Path) -> int:
    wrapped = byte_bpe(["<|endoftext|>"])
    wrapped.save(str(folder / "tokenizer.json"))
    return wrapped.get_vocab_size()


def write_t5_words(folder: Path, size: int = SIZE) -> int:
    """Words alone, with T5's special tokens: no beginning, </s> at the end."""
    pieces = ["<pad>", "</s>", "<unk>", *WORDS]
    pieces += [f"word{i}" for i in range(size - len(pieces) - 3)]
    pieces += [f"<extra_id_{i}>" for i in (2, 1, 0)]
    wrapped = library.Tokenizer(
        models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>")
    )
    wrapped.normalizer = normalizers.Lowercase()
    wrapped.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped.add_special_tokens([p for p in pieces if p.startswith("<")])
    wrapped.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    wrapped.save(str(folder / "tokenizer.json"))
    return size


def write_wordpiece_size(folder: Path) -> int:
    write_wordpiece(folder)
    return SIZE


BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 24, "bos_token_id": 0}
GPT2 |= {"eos_token_id": 0}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 24,
}
T5 = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 3,
    "relative_attention_max_distance": 20,
    "relative_attention_num_buckets": 8,
    "decoder_start_token_id": 0,
}
SWITCH = {**T5, "num_experts": 3, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}

# name of a case: class of the model, values of its configuration, its tokenizer
ENCODERS = {
    "bert": ("BertForMaskedLM", BERT, write_wordpiece_size),
    "bert-base": ("BertModel", BERT, write_wordpiece_size),
    "bert-pairs": ("BertForPreTraining", {**BERT, "hidden_act": "relu"}, write_wordpiece_size),
    "roberta": (
        "RobertaForMaskedLM",
        {**BERT, "type_vocab_size": 1, "max_position_embeddings": 26},
        write_roberta_bpe,
    ),
    "albert": ("AlbertForMaskedLM", {**BERT, "embedding_size": 16}, write_wordpiece_size),
    "albert-pairs": ("AlbertForPreTraining", {**BERT, "embedding_size": 16}, write_wordpiece_size),
    "electra": ("ElectraForPreTraining", {**BERT, "embedding_size": 16}, write_wordpiece_size),
    "electra-wide": ("ElectraForPreTraining", {**BERT, "embedding_size": 32}, write_wordpiece_size),
    "generator": ("ElectraForMaskedLM", {**BERT, "embedding_size": 16}, write_wordpiece_size),
    "gpt2": ("GPT2LMHeadModel", GPT2, write_gpt2_bpe),
    "gpt2-base": ("GPT2Model", {**GPT2, "n_inner": 40}, write_gpt2_bpe),
    "classifier": (
        "BertForSequenceClassification",
        {**BERT, "id2label": {0: "bad", 1: "good", 2: "so"}},
        write_wordpiece_size,
    ),
    "tagger": ("BertForTokenClassification", BERT, write_wordpiece_size),
    "reader": ("BertForQuestionAnswering", BERT, write_wordpiece_size),
    "roberta-classifier": (
        "RobertaForSequenceClassification",
        {**BERT, "type_vocab_size": 1, "num_labels": 3},
        write_roberta_bpe,
    ),
}
DECODERS = {
    "bart": ("BartForConditionalGeneration", BART, write_roberta_bpe),
    "t5": ("T5ForConditionalGeneration", T5, write_t5_words),
    "t5-gated": (
        "T5ForConditionalGeneration",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        write_t5_words,
    ),
    "switch": ("SwitchTransformersForConditionalGeneration", SWITCH, write_t5_words),
    "switch-untied": (
        "SwitchTransformersForConditionalGeneration",
        {**SWITCH, "tie_word_embeddings": False},
        write_t5_words,
    ),
}
CASES = ENCODERS | DECODERS


def checkpoint(folder: Path, case: str) -> nn.Module:
    """A random model of theirs, saved with its tokenizer."""
    import transformers

    name, values, write_tokenizer = CASES[case]
    folder.mkdir()
    size = write_tokenizer(folder)
    cls = getattr(transformers, name)
    config = cls.config_class(vocab_size=size, **values)
    with isolated():
        torch.manual_seed(0)
        model = randomised(cls(config))
    if case == "t5-gated":  # loading ties them; 1.1 has two
        model.lm_head.weight = nn.Parameter(model.shared.weight.detach().flip(0).clone())
    if case == "switch-untied":  # theirs then has three tables; ours reads one
        for stack in (model.encoder, model.decoder):
            stack.embed_tokens.weight = model.shared.weight
    model.save_pretrained(folder)
    return model


def batch_of(size: int, segments: bool = False) -> dict[str, Tensor]:
    tokens = torch.randint(5, size, (3, 11), generator=torch_generator(0, "tokens"))
    mask = torch.arange(11) < torch.tensor([[11], [7], [2]])
    out = {"tokens": tokens, "mask": mask}
    if segments:
        out["segments"] = (torch.arange(11) >= torch.tensor([[5], [3], [1]])).long()
    return out


def theirs_of(model: nn.Module, batch: dict[str, Tensor]):
    given = {"input_ids": batch["tokens"], "attention_mask": batch["mask"].long()}
    if "segments" in batch:
        given["token_type_ids"] = batch["segments"]
    if model.config.model_type == "roberta":  # it tells padding by the id
        given["input_ids"] = batch["tokens"].masked_fill(~batch["mask"], 1)
    return model(**given, output_hidden_states=True)


def logits_of(objective, batch: dict[str, Tensor]) -> Tensor:
    """What the head of a method or task says at every position."""
    features = objective.encoder(batch)
    if type(objective).__name__ in ("ReplacedToken", "Tagging"):
        return objective.head(features.last).squeeze(-1)
    if type(objective).__name__ == "SpanQA":
        return objective.head(features.last)
    if type(objective).__name__ == "Classification":
        return objective.head(features.pooled)
    return objective.head(features.last, objective.encoder.embedding)


@pytest.mark.parametrize("case", ENCODERS)
def test_encoders_compute_the_same_in_and_out(tmp_path, case):
    import transformers

    theirs = checkpoint(tmp_path / "given", case)
    run = import_run(tmp_path / "given", tmp_path / "run")
    ours = selfsup.load(run, device="cpu").objective
    model_type, name = theirs.config.model_type, ENCODERS[case][0]
    segments = model_type in ("bert", "albert", "electra")
    batch = batch_of(theirs.config.vocab_size, segments)
    expected, real = theirs_of(theirs, batch), batch["mask"]
    got = ours.encoder(batch)
    assert len(got.hidden) == len(expected.hidden_states)
    for hidden, other in zip(got.hidden, expected.hidden_states, strict=True):
        close(hidden[real], other[real])
    exported = export_run(run, tmp_path / "exported")
    again = getattr(transformers, name).from_pretrained(exported).eval()
    written = theirs_of(again, batch)
    for key in ("logits", "prediction_logits", "seq_relationship_logits", "pooler_output"):
        if key not in expected:
            continue
        before, after = getattr(expected, key), getattr(written, key)
        rows = real if before.shape[:2] == real.shape else slice(None)
        close(after[rows], before[rows])
        if key in ("logits", "prediction_logits"):
            close(logits_of(ours, batch)[rows], before[rows])
        if key == "pooler_output":
            close(got.pooled, before)
    if "reader" in case:
        for model in (expected, written):
            close(
                logits_of(ours, batch)[real],
                torch.stack((model.start_logits, model.end_logits), 2)[real],
            )
    if "pairs" in case:  # ours says 1 for the text as it was, theirs 0
        answer = ours.sentence_head(got.pooled)
        key = "seq_relationship_logits" if model_type == "bert" else "sop_logits"
        close(answer.flip(1), getattr(expected, key))
    twice = import_run(exported, tmp_path / "twice")
    assert_same_weights(run, twice)


def assert_same_weights(run: Path, other: Path) -> None:
    first, second = (load_file(path / "model" / "model.safetensors") for path in (run, other))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("case", DECODERS)
def test_decoders_compute_the_same_in_and_out(tmp_path, case):
    import transformers

    theirs = checkpoint(tmp_path / "given", case)
    run = import_run(tmp_path / "given", tmp_path / "run")
    ours = selfsup.load(run, device="cpu").encoder
    size = theirs.config.vocab_size
    batch, target = batch_of(size), batch_of(size)["tokens"][:, :9].flip(0)
    given = {"input_ids": batch["tokens"], "attention_mask": batch["mask"].long()}
    expected = theirs(**given, labels=target, output_hidden_states=True)
    read = ours(batch)
    for hidden, other in zip(read.hidden, expected.encoder_hidden_states, strict=True):
        close(hidden[batch["mask"]], other[batch["mask"]])
    shifted = ours.shifted(target)
    written = ours.decode(shifted, read)
    for hidden, other in zip(written.hidden, expected.decoder_hidden_states, strict=True):
        close(hidden, other)
    close(ours.logits(written.last), expected.logits)
    cache, steps = Cache(), []
    for place in range(target.shape[1]):
        seen = read if place == 0 else None
        steps.append(ours.decode(shifted[:, place : place + 1], seen, cache=cache).last)
    close(ours.logits(torch.cat(steps, 1)), expected.logits)
    exported = export_run(run, tmp_path / "exported")
    again = getattr(transformers, DECODERS[case][0]).from_pretrained(exported).eval()
    close(again(**given, labels=target).logits, expected.logits)
    assert_same_weights(run, import_run(exported, tmp_path / "twice"))


LAYOUT = {"dim": 32, "layers": 2, "heads": 4, "dropout": 0.0, "embedding_std": 1.0}
LAYOUT |= {"init_std": 0.17, "rotary_base": 100.0}
CAUSAL = {"causal": True, "pooling": "last"}


def run_of(folder: Path, method: dict, model: dict, write_tokenizer=write_wordpiece_size) -> Path:
    """A run of ours with random weights, as `selfsup pretrain` would leave it."""
    from selfsup.building import build_encoder, build_objective
    from selfsup.data.text_preprocessor import TextPreprocessor
    from selfsup.interop import tokenizers
    from selfsup.methods.generative import causal_language, masked_language
    from selfsup.model_folder import save_model
    from selfsup.models import transformer

    (folder / "pieces").mkdir(parents=True)
    write_tokenizer(folder / "pieces")
    tokenizer = tokenizers.load(folder / "pieces", {})
    config = transformer.Config(**model)
    encoder = build_encoder("transformer", config, tokenizer.vocabulary, 0)
    module = {"masked_language": masked_language, "causal_language": causal_language}
    given = module[method["name"]].Config(**{k: v for k, v in method.items() if k != "name"})
    built = build_objective("methods", method["name"], given, encoder, tokenizer.vocabulary, 0)
    sections = {"data": {"name": "text"}, "model": {"name": "transformer", **model}}
    preprocessor = TextPreprocessor(tokenizer, 24)
    save_model(folder / "model", randomised(built), {**sections, "method": method}, preprocessor)
    return folder


@pytest.mark.parametrize(
    ("method", "more", "write_tokenizer", "name"),
    [
        ("masked_language", {}, write_wordpiece_size, "EsmForMaskedLM"),
        (
            "causal_language",
            {"causal": True, "pooling": "last"},
            write_gpt2_bpe,
            "GPTNeoXForCausalLM",
        ),
    ],
)
def test_rotary_layouts_leave_as_architectures_that_compute_the_same(
    tmp_path, method, more, write_tokenizer, name
):
    import transformers

    run = run_of(tmp_path / "run", {"name": method}, LAYOUT | more, write_tokenizer)
    exported = export_run(run, tmp_path / "out")
    auto = transformers.AutoModelForMaskedLM if not more else transformers.AutoModelForCausalLM
    theirs = auto.from_pretrained(exported).eval()
    assert type(theirs).__name__ == name
    ours = selfsup.load(run, device="cpu").objective
    batch = batch_of(theirs.config.vocab_size)
    expected, got, real = theirs_of(theirs, batch), ours.encoder(batch), batch["mask"]
    for hidden, other in zip(got.hidden, expected.hidden_states, strict=True):
        close(hidden[real], other[real])
    close(logits_of(ours, batch)[real], expected.logits[real])


def test_a_table_of_segments_that_ours_lacks_is_written_as_zeros(tmp_path):
    import transformers

    model = {**LAYOUT, "norm": "post", "positions": "learned", "embedding_norm": True}
    model |= {"embedding_std": 0.0, "max_length": 24, "segment_types": 0}
    run = run_of(tmp_path / "run", {"name": "masked_language"}, model)
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(export_run(run, tmp_path / "out"))
    batch = batch_of(SIZE)
    got = logits_of(selfsup.load(run, device="cpu").objective, batch)
    close(got[batch["mask"]], theirs_of(theirs.eval(), batch).logits[batch["mask"]])


@pytest.mark.parametrize(
    ("method", "more", "word"),
    [
        ({"name": "masked_language", "head": "tied"}, {}, "method.head = 'tied'"),
        ({"name": "masked_language"}, {"activation": "swiglu"}, "model.activation = 'swiglu'"),
        ({"name": "masked_language"}, {"norm": "post"}, "model.norm = 'post'"),
        ({"name": "masked_language"}, {"positions": "none"}, "model.positions = 'none'"),
    ],
)
def test_layouts_without_a_counterpart_are_refused_by_their_key(tmp_path, method, more, word):
    run = run_of(tmp_path / "run", method, LAYOUT | more)
    with pytest.raises(ConfigError, match=word):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["bert", "roberta", "gpt2"])
def test_tokenizers_give_the_ids_of_auto_tokenizer(tmp_path, case):
    import transformers

    checkpoint(tmp_path / "given", case)
    run = import_run(tmp_path / "given", tmp_path / "run")
    exported = export_run(run, tmp_path / "exported")
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    model = selfsup.load(run, device="cpu")
    ours = model.preprocessor.tokenizer
    for text in TEXTS:
        assert ours.row(ours.encode([text])[0])[0].tolist() == theirs(text)["input_ids"]
    if case == "bert":
        first, second = ours.encode(["the cat", "a dog"])
        tokens, segments = ours.row(first, second)
        pair = theirs("the cat", "a dog")
        assert pair["input_ids"] == tokens.tolist()
        assert pair["token_type_ids"] == segments.tolist()
        given = transformers.BertTokenizer(str(tmp_path / "given" / "vocab.txt"))
        assert [given(text)["input_ids"] for text in TEXTS] == [
            theirs(text)["input_ids"] for text in TEXTS
        ]
    assert theirs.model_max_length == 24
    ((_, batch),) = model.preprocessor.batches(TEXTS[:1], 1)
    assert theirs(TEXTS[:1], return_tensors="pt")["input_ids"].equal(batch["tokens"])


def test_byte_bpe_from_vocabulary_and_merges(tmp_path):
    wrapped = byte_bpe(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    wrapped.model.save(str(tmp_path))
    from selfsup.interop import tokenizers

    tokenizer = tokenizers.load(tmp_path, {})
    for text in TEXTS:
        assert tokenizer.encode([text])[0].tolist() == wrapped.encode(text).ids
    assert tokenizer.decode(tokenizer.encode([TEXTS[2]])[0]) == TEXTS[2]
    known = tokenizer.vocabulary
    assert (known.cls, known.pad, known.sep, known.unk, known.mask) == (0, 1, 2, 3, 4)


def damaged(folder: Path, change) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def keys(folder: Path, **values) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


LAYER = "bert.encoder.layer.1.output.dense.bias"


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        (lambda f: damaged(f, lambda t: t.pop(LAYER)), CheckpointError, LAYER),
        (lambda f: damaged(f, lambda t: t.update(more=torch.zeros(2))), CheckpointError, "more"),
        (lambda f: damaged(f, lambda t: t[LAYER].fill_(torch.nan)), CheckpointError, "not finite"),
        (
            lambda f: damaged(f, lambda t: t.update({LAYER: torch.zeros(7)})),
            CheckpointError,
            r"does not fit encoder.layers.1.feedforward.down.bias",
        ),
        (
            lambda f: damaged(
                f, lambda t: t.update({"cls.predictions.decoder.bias": torch.ones(SIZE)})
            ),
            CheckpointError,
            "differs from cls.predictions.bias",
        ),
        (lambda f: keys(f, position_embedding_type="relative_key"), ConfigError, "relative_key"),
        (lambda f: keys(f, hidden_act="silu"), ConfigError, "hidden_act = 'silu'"),
        (lambda f: keys(f, model_type="mamba"), ConfigError, "model_type = 'mamba'"),
        (lambda f: keys(f, num_hidden_layers=4), CheckpointError, "layer.3"),
        (
            lambda f: keys(f, num_hidden_layers=10**6),
            CheckpointError,
            "config.json: describes a network much larger",
        ),
        (lambda f: keys(f, max_position_embeddings=10**12), CheckpointError, "config.json: "),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"damaged"),
            CheckpointError,
            "damaged or not a safetensors file",
        ),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            ConfigError,
            "can run code",
        ),
        (lambda f: (f / "model.safetensors").unlink(), ConfigError, "neither model.safetensors"),
        (lambda f: (f / "vocab.txt").unlink(), ConfigError, "no tokenizer"),
        (lambda f: (f / "vocab.txt").write_text("a\nb\n"), DataError, r"\[PAD\]"),
        (lambda f: write_wordpiece(f, SIZE + 3), ConfigError, "do not belong together"),
        (lambda f: (f / "config.json").write_text("{"), ConfigError, "not a JSON file"),
    ],
)
def test_bad_checkpoints_are_refused_by_name(tmp_path, change, error, word):
    checkpoint(tmp_path / "given", "bert")
    change(tmp_path / "given")
    with pytest.raises(error, match=word):
        import_run(tmp_path / "given", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "values", [{"id2label": {"0": "one"}}, {"problem_type": "multi_label_classification"}]
)
def test_heads_that_give_no_single_class_are_refused(tmp_path, values):
    checkpoint(tmp_path / "given", "classifier")
    keys(tmp_path / "given", **values)
    with pytest.raises(ConfigError, match="a number, or several labels at once"):
        import_run(tmp_path / "given", tmp_path / "run")


def test_a_model_that_translates_leaves_and_writes_the_same(tmp_path):
    import transformers

    from selfsup.config import to_mapping
    from selfsup.model_folder import save_model
    from selfsup.tasks.generation import Config, Generation

    checkpoint(tmp_path / "given", "bart")
    model = selfsup.load(import_run(tmp_path / "given", tmp_path / "run"), device="cpu")
    task = Generation(Config(num_beams=1, max_target=9, no_repeat=2), model.encoder)
    with torch.no_grad():
        model.encoder.embedding.tokens.weight[2] = 0.0  # a text that does not end at once
    values = {key: model.values[key] for key in ("data", "model")}
    values |= {"task": {"name": "generation", **to_mapping(task.config)}, "labels": {"names": []}}
    save_model(tmp_path / "fine" / "model", task, values, model.preprocessor)
    ours = selfsup.load(tmp_path / "fine", device="cpu")
    exported = export_run(tmp_path / "fine", tmp_path / "out")
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(exported).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    given = tokenizer(["the cat 3"], return_tensors="pt")["input_ids"]
    written = theirs.generate(given, suppress_tokens=task.unwritten.nonzero().flatten().tolist())
    values = ours.objective.predict({"tokens": given}).values
    assert values[0].tolist()[: written.shape[1] - 1] == written[0, 1:].tolist()
    assert written.shape[1] == 10
    answer = ours.generate("the cat 3", 9, temperature=0.0)
    assert ours.predict(["the cat 3"]) == [answer.strip()]
    assert len({ours.generate("the cat 3", 9, seed=seed) for seed in range(4)}) > 1


def test_an_imported_encoder_decoder_answers_as_theirs_does(tmp_path):
    theirs = checkpoint(tmp_path / "given", "t5")
    run = import_run(tmp_path / "given", tmp_path / "run")
    model = selfsup.load(run, device="cpu")
    tokenizer = model.preprocessor.tokenizer
    tokens, _ = tokenizer.row(tokenizer.encode(["the cat sat"])[0])
    source = torch.from_numpy(tokens).long().unsqueeze(0)
    written = theirs.generate(source, max_new_tokens=8, eos_token_id=1, do_sample=False)[0]
    text = tokenizer.decode(written.tolist())
    assert text.split()
    assert model.generate("the cat sat", 8, temperature=0.0) == text


@pytest.mark.parametrize("case", ["roberta", "electra"])
def test_a_head_that_knows_one_activation_refuses_others(tmp_path, case):
    checkpoint(tmp_path / "given", case)
    keys(tmp_path / "given", hidden_act="relu")
    with pytest.raises(ConfigError, match="hidden_act = 'relu' is not supported; gelu are"):
        import_run(tmp_path / "given", tmp_path / "run")


def test_a_gpt2_with_another_scale_is_refused(tmp_path):
    checkpoint(tmp_path / "given", "gpt2-base")
    keys(tmp_path / "given", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ConfigError, match="scale_attn_by_inverse_layer_idx = True"):
        import_run(tmp_path / "given", tmp_path / "run")


def test_shards_and_old_names_read_like_one_file(tmp_path):
    checkpoint(tmp_path / "given", "bert")
    whole = import_run(tmp_path / "given", tmp_path / "whole")
    tensors = load_file(tmp_path / "given" / "model.safetensors")
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor
        for name, tensor in tensors.items()
    }
    tensors["bert.embeddings.position_ids"] = torch.arange(24).unsqueeze(0)
    (tmp_path / "given" / "model.safetensors").unlink()
    parts = {"one.safetensors": sorted(tensors)[::2], "two.safetensors": sorted(tensors)[1::2]}
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, tmp_path / "given" / file)
    index = {name: file for file, names in parts.items() for name in names}
    path = tmp_path / "given" / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    assert_same_weights(whole, import_run(tmp_path / "given", tmp_path / "shards"))
    (tmp_path / "given" / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"two\.safetensors is missing"):
        import_run(tmp_path / "given", tmp_path / "lost")
    path.write_text("[]")
    with pytest.raises(CheckpointError, match="not an index of shards"):
        import_run(tmp_path / "given", tmp_path / "lost")


def test_rows_of_the_table_that_no_token_has_are_left_out(tmp_path, capsys):
    checkpoint(tmp_path / "given", "bert")
    write_wordpiece(tmp_path / "given", SIZE - 4)
    run = import_run(tmp_path / "given", tmp_path / "run")
    assert "4 of 61 rows" in capsys.readouterr().err
    table = load_file(tmp_path / "given" / "model.safetensors")
    got = selfsup.load(run, device="cpu").objective
    words = table["bert.embeddings.word_embeddings.weight"][: SIZE - 4]
    assert torch.equal(got.encoder.embedding.tokens.weight, words)
    assert torch.equal(got.head.bias, table["cls.predictions.bias"][: SIZE - 4])


def test_an_imported_run_works_with_the_other_verbs(tmp_path, capsys):
    checkpoint(tmp_path / "given", "bert-base")
    run = selfsup.import_(tmp_path / "given", tmp_path / "run")
    assert "no weights for head of masked_language" in capsys.readouterr().err
    model = selfsup.load(run, device="cpu")
    assert model.embed(["the cat", "a dog sat"]).shape == (2, 32)
    assert len(model.fill("the [MASK] sat", top=3)[0]) == 3
    rows = [f"the cat {i},good\na dog {i},bad\n" for i in range(6)]
    (tmp_path / "toy.csv").write_text("text,label\n" + "".join(rows))
    settings = {"training.steps": 3, "task.pooling": "encoder"}
    fine = selfsup.finetune(
        run, "classification", tmp_path / "toy.csv", tmp_path / "fine", settings=settings
    )
    assert len(selfsup.load(fine).predict(["the cat"])) == 1
    import transformers

    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        selfsup.export(fine, tmp_path / "out")
    )
    assert theirs.config.id2label == {0: "bad", 1: "good"}
    assert selfsup.report([run]).is_file()
    with pytest.raises(ConfigError, match="known: peft, transformers"):
        selfsup.export(run, tmp_path / "other", to="onnx")
    with pytest.raises(ConfigError, match="exists already"):
        selfsup.export(run, tmp_path / "out")


def test_a_name_that_is_neither_a_folder_nor_on_the_hub(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="there is no such folder"):
        import_run(tmp_path / "nothing here", tmp_path / "run")
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def refused(name, **options):
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
    with pytest.raises(ConfigError, match=r"did not give it \(offline\)"):
        import_run("some/model", tmp_path / "run")
