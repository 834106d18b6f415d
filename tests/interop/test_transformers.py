"""Checkpoints in and out, held against `transformers` number for number."""

from pathlib import Path

import pytest
import tokenizers as library
import torch
from safetensors.torch import load_file
from tokenizers import models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

import selfsup
from selfsup.interop.transformers import export_run, import_run
from selfsup.models.attention import Cache
from selfsup.randomness import isolated, torch_generator

WORDS = tuple(
    [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "and",
        "it",
        "was",
        "un",
        "##happy",
        "##ness",
        "dog",
        "世",
        "界",
        "😀",
        ",",
        ".",
        "!",
    ]
)
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
        model = randomised(cls(config))
    if case == "t5-gated":  # loading ties them; 1.1 has two
        model.lm_head.weight = nn.Parameter(model.shared.weight.detach().flip(0).clone())
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
