"""Our layouts against `transformers`, number for number, with copied weights in float32."""

import pytest
import torch
from torch import Tensor, nn

from selfsup.batch import Vocabulary
from selfsup.models.transformer import Config, TransformerEncoder
from selfsup.models.view import Cache
from selfsup.models.vocabulary_head import VocabularyHead
from selfsup.randomness import isolated, seed_layers, torch_generator

SIZE = 61
BERT = Config(
    dim=32,
    layers=3,
    heads=4,
    feedforward_dim=48,
    norm="post",
    norm_eps=1e-12,
    positions="learned",
    max_length=20,
    segment_types=2,
    embedding_norm=True,
    pooling="bert",
)
GPT2 = Config(
    dim=32,
    layers=3,
    heads=4,
    positions="learned",
    max_length=20,
    activation="gelu_tanh",
    causal=True,
    pooling="last",
)


def randomised(model: nn.Module) -> nn.Module:
    """Every weight random, biases and norms too, so that none can be left out unnoticed."""
    generator = torch_generator(0, "weights")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


def copy(ours: nn.Module, theirs: nn.Module) -> None:
    ours.load_state_dict(theirs.state_dict())


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def build(config: Config) -> TransformerEncoder:
    with isolated():
        seed_layers(0, "model")
        return TransformerEncoder(config, Vocabulary(size=SIZE)).eval()


def fuse(ours: nn.Linear, parts: list[nn.Linear]) -> None:
    ours.load_state_dict(
        {
            "weight": torch.cat([part.weight for part in parts]),
            "bias": torch.cat([part.bias for part in parts]),
        }
    )


def copy_bert(encoder: TransformerEncoder, theirs: nn.Module) -> None:
    copy(encoder.embedding.tokens, theirs.embeddings.word_embeddings)
    copy(encoder.embedding.positions, theirs.embeddings.position_embeddings)
    copy(encoder.embedding.segments, theirs.embeddings.token_type_embeddings)
    copy(encoder.embedding.norm, theirs.embeddings.LayerNorm)
    for ours, layer in zip(encoder.layers, theirs.encoder.layer, strict=True):
        attention = layer.attention.self
        fuse(ours.attention.qkv, [attention.query, attention.key, attention.value])
        copy(ours.attention.out, layer.attention.output.dense)
        copy(ours.attention_norm, layer.attention.output.LayerNorm)
        copy(ours.feedforward.up, layer.intermediate.dense)
        copy(ours.feedforward.down, layer.output.dense)
        copy(ours.feedforward_norm, layer.output.LayerNorm)


def copy_gpt2(encoder: TransformerEncoder, theirs: nn.Module) -> None:
    def transposed(ours: nn.Linear, conv: nn.Module) -> None:  # its Conv1D stores (in, out)
        ours.load_state_dict({"weight": conv.weight.T, "bias": conv.bias})

    copy(encoder.embedding.tokens, theirs.wte)
    copy(encoder.embedding.positions, theirs.wpe)
    for ours, layer in zip(encoder.layers, theirs.h, strict=True):
        copy(ours.attention_norm, layer.ln_1)
        transposed(ours.attention.qkv, layer.attn.c_attn)
        transposed(ours.attention.out, layer.attn.c_proj)
        copy(ours.feedforward_norm, layer.ln_2)
        transposed(ours.feedforward.up, layer.mlp.c_fc)
        transposed(ours.feedforward.down, layer.mlp.c_proj)
    copy(encoder.final_norm, theirs.ln_f)


def bert_config():
    from transformers import BertConfig

    return BertConfig(
        vocab_size=SIZE,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=20,
    )


@pytest.fixture
def batch() -> dict[str, Tensor]:
    tokens = torch.randint(0, SIZE, (3, 11), generator=torch_generator(0, "tokens"))
    mask = torch.arange(11) < torch.tensor([[11], [7], [2]])
    segments = (torch.arange(11) >= torch.tensor([[5], [3], [1]])).long()
    return {"tokens": tokens, "mask": mask, "segments": segments}


def test_bert_every_layer_and_pooler(batch):
    from transformers import BertModel

    with isolated():
        theirs = randomised(BertModel(bert_config()))
    encoder = build(BERT)
    copy_bert(encoder, theirs)
    copy(encoder.pooler, theirs.pooler.dense)
    expected = theirs(
        input_ids=batch["tokens"],
        attention_mask=batch["mask"].long(),
        token_type_ids=batch["segments"],
        output_hidden_states=True,
    )
    got, real = encoder(batch), batch["mask"]
    assert len(got.hidden) == len(expected.hidden_states) == 4
    for ours, hidden in zip(got.hidden, expected.hidden_states, strict=True):
        close(ours[real], hidden[real])
    close(got.last[real], expected.last_hidden_state[real])
    close(got.pooled, expected.pooler_output)


def test_bert_masked_language_logits(batch):
    from transformers import BertForMaskedLM

    with isolated():
        theirs = randomised(BertForMaskedLM(bert_config()))
    encoder = build(BERT)
    copy_bert(encoder, theirs.bert)
    head = VocabularyHead(encoder, transform=True)
    predictions = theirs.cls.predictions
    copy(head.dense, predictions.transform.dense)
    copy(head.norm, predictions.transform.LayerNorm)
    with torch.no_grad():
        head.bias.copy_(predictions.decoder.bias)
    expected = theirs(
        input_ids=batch["tokens"],
        attention_mask=batch["mask"].long(),
        token_type_ids=batch["segments"],
    ).logits
    chosen = batch["mask"] & (batch["tokens"] % 3 == 0)  # the head sees only these
    assert chosen.any()
    close(head(encoder(batch).last[chosen], encoder.embedding), expected[chosen])


def test_gpt2_every_layer_and_logits(batch):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=SIZE, n_embd=32, n_layer=3, n_head=4, n_positions=20)
    with isolated():
        theirs = randomised(GPT2LMHeadModel(config))
    encoder = build(GPT2)
    copy_gpt2(encoder, theirs.transformer)
    head = VocabularyHead(encoder, transform=False)
    for mask in (None, batch["mask"]):
        expected = theirs(
            input_ids=batch["tokens"],
            attention_mask=None if mask is None else mask.long(),
            output_hidden_states=True,
        )
        given = {"tokens": batch["tokens"]} | ({} if mask is None else {"mask": mask})
        got = encoder(given)
        real = got.mask
        for ours, hidden in zip(got.hidden, expected.hidden_states, strict=True):
            close(ours[real], hidden[real])
        close(head(got.last[real], encoder.embedding), expected.logits[real])


def test_gpt2_greedy_text_through_the_cache(batch):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=SIZE, n_embd=32, n_layer=3, n_head=4, n_positions=20, eos_token_id=None
    )
    with isolated():
        theirs = randomised(GPT2LMHeadModel(config))
    encoder = build(GPT2)
    copy_gpt2(encoder, theirs.transformer)
    head, cache, written = VocabularyHead(encoder, transform=False), Cache(), []
    tokens = prompt = batch["tokens"][:, :6]
    for _ in range(8):
        last = encoder({"tokens": tokens}, cache).last[:, -1]
        tokens = head(last, encoder.embedding).argmax(-1, keepdim=True)
        written.append(tokens)
    expected = prompt
    for _ in range(8):  # their model without a cache
        following = theirs(input_ids=expected).logits[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, following], 1)
    assert torch.equal(torch.cat(written, 1), expected[:, 6:])
