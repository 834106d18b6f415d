"""Decoding against `transformers`, against exhaustive search, and with against without a cache."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from selfsup.batch import Batch, Vocabulary
from selfsup.errors import ConfigError
from selfsup.models import encoder_decoder, transformer
from selfsup.models.decoding import (
    CausalWriter,
    DecoderWriter,
    Rules,
    beam_search,
    never_written,
    sample,
)
from selfsup.models.encoder_decoder import EncoderDecoder
from selfsup.models.transformer import TransformerEncoder
from selfsup.models.vocabulary_head import VocabularyHead
from selfsup.randomness import isolated, torch_generator

SIZE, PAD, END = 40, 0, 1
VOCABULARY = Vocabulary(size=SIZE, pad=PAD, sep=END)
SHAPE = {"dim": 16, "layers": 2, "heads": 2, "dropout": 0.0}


def copy(ours: nn.Parameter, *theirs: Tensor) -> None:
    with torch.no_grad():
        ours.copy_(torch.cat(theirs) if len(theirs) > 1 else theirs[0])


def copy_all(ours: nn.Module, theirs: nn.Module) -> None:
    ours.load_state_dict(theirs.state_dict())


def randomised(model: nn.Module, std: float) -> nn.Module:
    """Weights so large that texts differ from row to row."""
    generator = torch_generator(0, "weights")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=std)
    return model.eval()


# The same model here and in `transformers`


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=SIZE, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=PAD, pad_token_id=PAD, eos_token_id=END,
    )  # fmt: skip
    with isolated():
        theirs = randomised(T5ForConditionalGeneration(config), 0.25)
    ours = EncoderDecoder(
        encoder_decoder.Config(
            **SHAPE, head_width=8, feedforward_dim=32, norm_kind="rms", norm_eps=1e-6, bias=False,
            positions="relative", activation="relu", init_std=0.25, embedding_std=1.0, start="pad",
        ),
        VOCABULARY,
    ).eval()  # fmt: skip
    copy(ours.embedding.tokens.weight, theirs.shared.weight / 4)
    for stack, other in ((ours.source, theirs.encoder), (ours.target, theirs.decoder)):
        copy_all(
            stack.relative.table, other.block[0].layer[0].SelfAttention.relative_attention_bias
        )
        copy_all(stack.final_norm, other.final_layer_norm)
        for block, (first, *middle, last) in zip(
            stack.layers, (block.layer for block in other.block), strict=True
        ):
            q, k, v = (getattr(first.SelfAttention, name).weight for name in "qkv")
            copy(block.attention.qkv.weight, q * 8**0.5, k, v)
            copy_all(block.attention.out, first.SelfAttention.o)
            copy_all(block.attention_norm, first.layer_norm)
            for cross in middle:
                q, k, v = (getattr(cross.EncDecAttention, name).weight for name in "qkv")
                copy(block.cross.query.weight, q * 8**0.5)
                copy(block.cross.kv.weight, k, v)
                copy_all(block.cross.out, cross.EncDecAttention.o)
                copy_all(block.cross_norm, cross.layer_norm)
            copy_all(block.feedforward.up, last.DenseReluDense.wi)
            copy_all(block.feedforward.down, last.DenseReluDense.wo)
            copy_all(block.feedforward_norm, last.layer_norm)
    return ours, theirs


def bart():
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=SIZE, d_model=16, encoder_layers=2, decoder_layers=2, dropout=0.0,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
        decoder_ffn_dim=64, max_position_embeddings=30, pad_token_id=PAD, eos_token_id=END,
        bos_token_id=2, decoder_start_token_id=END, forced_eos_token_id=None,
    )  # fmt: skip
    with isolated():
        theirs = randomised(BartForConditionalGeneration(config), 0.25)
    ours = EncoderDecoder(
        encoder_decoder.Config(
            **SHAPE, norm="post", positions="learned", embedding_norm=True, max_length=30
        ),
        VOCABULARY,
    ).eval()
    copy(ours.embedding.tokens.weight, theirs.model.shared.weight)
    stacks = ((ours.source, theirs.model.encoder), (ours.target, theirs.model.decoder))
    for stack, other in stacks:
        copy(stack.embedding.positions.weight, other.embed_positions.weight[2:])
        copy_all(stack.embedding.norm, other.layernorm_embedding)
        for block, layer in zip(stack.layers, other.layers, strict=True):
            for kind in ("weight", "bias"):
                parts = [getattr(layer.self_attn, f"{name}_proj") for name in "qkv"]
                copy(getattr(block.attention.qkv, kind), *(getattr(p, kind) for p in parts))
            copy_all(block.attention.out, layer.self_attn.out_proj)
            copy_all(block.attention_norm, layer.self_attn_layer_norm)
            if other is theirs.model.decoder:
                q, k, v = (getattr(layer.encoder_attn, f"{name}_proj") for name in "qkv")
                copy_all(block.cross.query, q)
                copy(block.cross.kv.weight, k.weight, v.weight)
                copy(block.cross.kv.bias, k.bias, v.bias)
                copy_all(block.cross.out, layer.encoder_attn.out_proj)
                copy_all(block.cross_norm, layer.encoder_attn_layer_norm)
            copy_all(block.feedforward.up, layer.fc1)
            copy_all(block.feedforward.down, layer.fc2)
            copy_all(block.feedforward_norm, layer.final_layer_norm)
    return ours, theirs


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=SIZE, n_embd=16, n_layer=2, n_head=2, n_positions=30, eos_token_id=END,
        bos_token_id=END, pad_token_id=PAD, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    with isolated():
        theirs = randomised(GPT2LMHeadModel(config), 0.25)
    ours = TransformerEncoder(
        transformer.Config(
            **SHAPE, positions="learned", max_length=30, activation="gelu_tanh", causal=True
        ),
        VOCABULARY,
    ).eval()
    copy_all(ours.embedding.tokens, theirs.transformer.wte)
    copy_all(ours.embedding.positions, theirs.transformer.wpe)
    copy_all(ours.final_norm, theirs.transformer.ln_f)
    for block, layer in zip(ours.layers, theirs.transformer.h, strict=True):
        copy_all(block.attention_norm, layer.ln_1)
        copy_all(block.feedforward_norm, layer.ln_2)
        for linear, conv in (
            (block.attention.qkv, layer.attn.c_attn),
            (block.attention.out, layer.attn.c_proj),
            (block.feedforward.up, layer.mlp.c_fc),
            (block.feedforward.down, layer.mlp.c_proj),
        ):
            linear.load_state_dict({"weight": conv.weight.T, "bias": conv.bias})
    return ours, theirs


PAIRS = {"t5": t5, "bart": bart, "gpt2": gpt2}


def sources(left: bool) -> Batch:
    lengths = torch.tensor([9, 4, 7, 1, 6, 8])
    tokens = torch.randint(3, SIZE, (len(lengths), 9), generator=torch_generator(3, "sources"))
    mask = torch.arange(9) < lengths.unsqueeze(1)
    mask = mask.flip(1) if left else mask
    return {"tokens": tokens.where(mask, PAD), "mask": mask}


def writer_of(ours: nn.Module, batch: Batch):
    if isinstance(ours, EncoderDecoder):
        return DecoderWriter(ours, ours(batch))
    return CausalWriter(ours, VocabularyHead(ours, transform=False), batch)


def theirs_writes(theirs: nn.Module, batch: Batch, end: int, **options):
    out = theirs.generate(
        batch["tokens"],
        attention_mask=batch["mask"].long(),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=PAD,
        eos_token_id=end,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    prompt = 1 if theirs.config.is_encoder_decoder else batch["tokens"].shape[1]
    return out.sequences[:, prompt:], getattr(out, "sequences_scores", None)


def same(got: Tensor, expected: Tensor, end: int) -> None:
    """Equal up to the end of each text; theirs fills the rest with `end` where the pad id is 0."""
    for row, text in zip(got.tolist(), expected.tolist(), strict=True):
        length = text.index(end) + 1 if end in text else len(text)
        assert row == text[:length] + [PAD] * (len(row) - length)


@pytest.fixture(scope="module", params=PAIRS)
def pair(request):
    """Both models, and rules by which some texts end early and some late."""
    with isolated():
        torch.manual_seed(0)
        ours, theirs = PAIRS[request.param]()
    batch = sources(left=not isinstance(ours, EncoderDecoder))
    free = sample(writer_of(ours, batch), Rules(max_tokens=12, end=-1, pad=PAD))
    common = torch.bincount(free[:, 1:].flatten(), minlength=SIZE)
    return ours, theirs, batch, Rules(max_tokens=12, end=int(common.argmax()), pad=PAD)


def test_greedy_text_equals_transformers(pair):
    ours, theirs, batch, rules = pair
    got = sample(writer_of(ours, batch), rules)
    same(got, theirs_writes(theirs, batch, rules.end, num_beams=1)[0], rules.end)
    lengths = {row.index(rules.end) if rules.end in row else 12 for row in got.tolist()}
    assert len(lengths) >= 2


BEAMS = [
    {"num_beams": 2},
    {"num_beams": 3, "length_penalty": 0.0},
    {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True},
    {"num_beams": 4, "length_penalty": 0.6, "early_stopping": "never"},
    {"num_beams": 4, "length_penalty": -1.0, "early_stopping": "never"},
    {"num_beams": 3, "early_stopping": True},
]


@pytest.mark.parametrize("options", BEAMS, ids=str)
def test_beam_search_equals_transformers(pair, options):
    ours, theirs, batch, rules = pair
    got = beam_search(writer_of(ours, batch), rules, **options, num_best=2)
    expected, scores = theirs_writes(theirs, batch, rules.end, **options, num_return_sequences=2)
    same(got.tokens.flatten(0, 1), expected, rules.end)
    torch.testing.assert_close(got.scores.flatten(), scores, rtol=1e-4, atol=1e-5)
    ended = (got.tokens == rules.end).any(2)
    assert ended.any()


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("rule", [{"no_repeat": 2}, {"min_tokens": 8}], ids=str)
def test_rules_equal_transformers(pair, num_beams, rule):
    ours, theirs, batch, rules = pair
    if isinstance(ours, TransformerEncoder) and "no_repeat" in rule:
        return  # theirs counts what stands in the prompt, too
    if "no_repeat" in rule:  # and the start token
        rules = replace(rules, end=ours.start)

    def write(rules: Rules) -> Tensor:
        if num_beams == 1:
            return sample(writer_of(ours, batch), rules)
        return beam_search(writer_of(ours, batch), rules, num_beams).tokens[:, 0]

    got = write(replace(rules, **rule))
    names = {"no_repeat": "no_repeat_ngram_size", "min_tokens": "min_new_tokens"}
    given = {names[name]: value for name, value in rule.items()}
    same(got, theirs_writes(theirs, batch, rules.end, num_beams=num_beams, **given)[0], rules.end)
    assert num_beams > 1 or not torch.equal(got, write(rules))  # beams may have kept to it


# Without `transformers`


def test_rules_by_hand():
    written = torch.tensor([[3, 4, 3, 5, 3], [2, 2, 2, 2, 2]])
    zeros = torch.zeros(2, 6)

    def banned(**rule) -> list[list[int]]:
        scores = Rules(max_tokens=9, end=1, pad=0, **rule).apply(zeros, written)
        return [row.isneginf().nonzero().flatten().tolist() for row in scores]

    assert banned() == [[], []]
    assert banned(no_repeat=1) == [[3, 4, 5], [2]]
    assert banned(no_repeat=2) == [[4, 5], [2]]  # after 3
    assert banned(no_repeat=3) == [[], [2]]
    assert banned(no_repeat=6) == [[], []]
    assert banned(min_tokens=5) == [[], []]
    assert banned(min_tokens=6) == [[1], [1]]
    assert not zeros.isneginf().any()


class TableWriter:
    """The next token depends on the last two alone, by a table: nothing is cached."""

    parts = ()

    def __init__(self, rows: int, size: int):
        self.table = torch.randn(
            rows, size + 1, size + 1, size, generator=torch_generator(1, "table")
        )
        self.table = (self.table * 1.5).log_softmax(-1)
        self.row = torch.arange(rows)
        self.last = torch.full((rows, 2), size)

    def next_logits(self, newest):
        if newest is not None:
            self.last = torch.stack((self.last[:, 1], newest), 1)
        return self.table[self.row, self.last[:, 0], self.last[:, 1]]

    def select(self, rows):
        self.row, self.last = self.row[rows], self.last[rows]


def exhaustive(table: Tensor, end: int, max_tokens: int, penalty: float) -> list:
    """Every text that ends, or is as long as may be, with its score; the best first."""
    size, found = table.shape[-1], []
    for length in range(1, max_tokens + 1):
        for text in itertools.product(range(size), repeat=length):
            if end in text[:-1] or (text[-1] != end and length < max_tokens):
                continue
            padded = (size, size, *text)
            nats = sum(float(table[padded[i : i + 3]]) for i in range(length))
            found.append((nats / length**penalty, text))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("penalty", [0.0, 1.0, -0.5])
def test_enough_beams_find_what_exhaustive_search_finds(penalty):
    rules = Rules(max_tokens=4, end=1, pad=0)
    writer = TableWriter(rows=3, size=4)
    table = writer.table
    got = beam_search(writer, rules, 64, length_penalty=penalty, early_stopping="never", num_best=5)
    for row in range(3):
        expected = exhaustive(table[row], 1, 4, penalty)[:5]
        for place, (score, text) in enumerate(expected):
            written = [*text, *[0] * (4 - len(text))]
            assert got.tokens[row, place].tolist() == written
            assert float(got.scores[row, place]) == pytest.approx(score, rel=1e-4)


def test_few_beams_find_less_than_many():
    rules = Rules(max_tokens=6, end=1, pad=0)
    best = [
        beam_search(TableWriter(20, 6), rules, n, length_penalty=0.0, early_stopping="never")
        for n in (1, 2, 8)
    ]
    one, two, many = (found.scores[:, 0].mean() for found in best)
    assert one < two < many


def test_a_beam_of_rows_gives_each_what_it_gives_alone(pair):
    ours, _, batch, rules = pair
    got = beam_search(writer_of(ours, batch), rules, 3)
    for row, real in list(enumerate(batch["mask"]))[1:4]:
        alone = {"tokens": batch["tokens"][row, real].unsqueeze(0)}
        found = beam_search(writer_of(ours, alone), rules, 3)
        assert torch.equal(found.tokens[0], got.tokens[row])
        torch.testing.assert_close(found.scores[0], got.scores[row], rtol=1e-4, atol=1e-5)


def test_the_cache_changes_nothing(pair):
    """Greedy text, everything read anew for each token."""
    ours, _, batch, rules = pair
    got = sample(writer_of(ours, batch), rules)
    for row in (0, 3):
        source = batch["tokens"][row, batch["mask"][row]].unsqueeze(0)
        text: list[int] = []
        while len(text) < 12 and rules.end not in text:
            so_far = torch.tensor([text], dtype=torch.long)
            if isinstance(ours, EncoderDecoder):
                start = torch.tensor([[ours.start]])
                read = ours({"tokens": source})
                logits = ours.logits(ours.decode(torch.cat((start, so_far), 1), read).last)
            else:
                head = VocabularyHead(ours, transform=False)
                hidden = ours({"tokens": torch.cat((source, so_far), 1)}).last
                logits = head(hidden, ours.embedding)
            text.append(int(logits[0, -1].argmax()))
        assert got[row].tolist() == text + [PAD] * (12 - len(text))


def test_special_tokens_are_never_written():
    ours, _ = bart()
    read = ours(sources(left=False))
    free = sample(DecoderWriter(ours, read), Rules.of(VOCABULARY, 12))
    mask, unk = sorted(set(free.flatten().tolist()))[-2:]
    vocabulary = Vocabulary(size=SIZE, pad=PAD, sep=END, mask=mask, unk=unk)
    unwritten = never_written(vocabulary)
    assert unwritten.nonzero().flatten().tolist() == [PAD, mask, unk]
    written = sample(DecoderWriter(ours, read, unwritten), Rules.of(vocabulary, 12))
    assert not {mask, unk} & set(written.flatten().tolist())


def test_the_pad_token_stands_in_the_end_where_there_is_none():
    assert Rules.of(Vocabulary(size=9, sep=3), 5).pad == 3
    assert Rules.of(Vocabulary(size=9, sep=3, pad=0), 5, 2) == Rules(
        max_tokens=5, end=3, pad=0, no_repeat=2
    )


@pytest.mark.parametrize("num_best", [0, 3])
def test_no_more_texts_than_beams(num_best):
    with pytest.raises(ConfigError, match="1 to num_beams = 2 texts"):
        beam_search(TableWriter(1, 4), Rules(max_tokens=2, end=1, pad=0), 2, num_best=num_best)
