"""Writing text: an encoder-decoder's training step, and generation, against `transformers`.

Both sides read the same rows and have the same shape, precision and threads. T5 hides spans of a
row and writes them: ours hides other spans in every step, the peer always those of one draw.
Generation is greedy and keeps what was read; no token ends a text, so all rows reach full length.
"""

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.text import Models, causal_models, draw
from benchmarks.timing import (
    Pair,
    best_rates,
    num_parameters,
    own_adamw,
    peer_adamw,
    stepper,
    turn,
    unit,
)
from selfsup.batch import Vocabulary
from selfsup.methods.generative.corruptions import compacted
from selfsup.methods.generative.denoising import Config as DenoisingConfig
from selfsup.methods.generative.denoising import Denoising
from selfsup.models.decoding import DecoderWriter, Rules, sample
from selfsup.models.encoder_decoder import Config, EncoderDecoder
from selfsup.training.device import autocast, pick_dtype

SENTINELS = 50  # enough for rows of 900 tokens


def t5(dim: int, layers: int, batch: int, time_: int, vocabulary: int) -> Pair:
    """Span corruption, tokens/s of the rows before they are corrupted."""
    dtype = pick_dtype("auto", torch.device("cpu"))
    ours, peer = t5_models(dim, layers, vocabulary)
    generator = torch.Generator().manual_seed(0)
    tokens = draw(batch, time_, vocabulary - SENTINELS)
    rows = compacted(tokens, torch.ones_like(tokens, dtype=torch.bool))
    source, target, predicted = ours.corrupt(rows, generator)
    labels = torch.where(predicted, target.tokens, -100)
    given = {"input_ids": source.tokens, "labels": labels}
    if not source.mask.all():
        given["attention_mask"] = source.mask.long()
    rates = best_rates(
        turn(
            stepper(
                ours, own_adamw(ours), lambda: ours.loss({"tokens": tokens}, generator).loss, dtype
            )
        ),
        turn(stepper(peer, peer_adamw(peer), lambda: peer(**given).loss, dtype)),
        tokens.numel(),
    )
    return *rates, unit("tokens", dtype)


def t5_models(dim: int, layers: int, vocabulary: int) -> Models:
    """Both sides in the layout of T5's first version, without dropout."""
    from transformers import T5Config, T5ForConditionalGeneration

    sentinels = tuple(range(vocabulary - SENTINELS, vocabulary))
    spec = Vocabulary(size=vocabulary, pad=0, sep=1, unk=2, sentinels=sentinels)
    model = Config(
        dim=dim,
        layers=layers,
        heads=dim // 64,
        norm="pre",
        norm_kind="rms",
        norm_eps=1e-6,
        positions="relative",
        activation="relu",
        bias=False,
        dropout=0.0,
        init_std=dim**-0.5,
        embedding_std=1.0,
        start="pad",
    )
    method = DenoisingConfig(corruptions=("sentinel_spans",))
    ours = Denoising(method, EncoderDecoder(model, spec), spec)
    peer = T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocabulary,
            d_model=dim,
            d_kv=64,
            d_ff=4 * dim,
            num_layers=layers,
            num_heads=dim // 64,
            dropout_rate=0.0,
            eos_token_id=None,
            pad_token_id=0,
            decoder_start_token_id=0,
        )
    ).train()
    assert num_parameters(ours) == num_parameters(peer), num_parameters(ours, peer)
    return ours, peer


def generate(
    dim: int, layers: int, batch: int, prompt: int, new_tokens: int, vocabulary: int
) -> Pair:
    """`CausalLanguage.generate`, new tokens/s, against GPT2LMHeadModel.generate."""
    dtype = pick_dtype("auto", torch.device("cpu"))
    ours, peer = causal_models(dim, layers, vocabulary, longest=prompt + new_tokens)
    ours.eval(), peer.eval()
    tokens, generator = draw(batch, prompt, vocabulary), torch.Generator()
    rates = best_rates(
        turn(
            in_precision(
                dtype,
                lambda: ours.generate({"tokens": tokens}, new_tokens, generator, temperature=0.0),
            )
        ),
        turn(in_precision(dtype, lambda: written_by(peer, tokens, new_tokens)[:, prompt:])),
        batch * new_tokens,
    )
    return *rates, unit("new tokens", dtype)


def generate_t5(
    dim: int, layers: int, batch: int, source: int, new_tokens: int, vocabulary: int
) -> Pair:
    """An encoder-decoder through `sample`, new tokens/s, against T5's generate."""
    dtype = pick_dtype("auto", torch.device("cpu"))
    method, peer = t5_models(dim, layers, vocabulary)
    model = method.encoder.eval()
    peer.eval()
    tokens = draw(batch, source, vocabulary - SENTINELS)
    rules = Rules(max_tokens=new_tokens, end=-1, pad=0)  # no token has the number -1

    @torch.no_grad()
    def write() -> torch.Tensor:
        return sample(DecoderWriter(model, model({"tokens": tokens})), rules)

    rates = best_rates(
        turn(in_precision(dtype, write)),
        turn(in_precision(dtype, lambda: written_by(peer, tokens, new_tokens)[:, 1:])),
        batch * new_tokens,
    )
    return *rates, unit("new tokens", dtype)


def written_by(peer, tokens: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Greedy text of a model of transformers, all of which is real."""
    mask = torch.ones_like(tokens)
    return peer.generate(
        tokens, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, use_cache=True
    )


def in_precision(dtype: torch.dtype, write: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """Writing under autocast; every row has to reach the full length."""
    shapes = set()

    def step() -> None:
        with autocast(torch.device("cpu"), dtype):
            shapes.add(tuple(write().shape))
        assert len(shapes) == 1, shapes

    return step


BENCHMARKS: dict[str, Callable[[], Pair]] = {
    "t5_4x256": partial(t5, 256, 4, 16, 256, 16000),
    "generate_4x256": partial(generate, 256, 4, 16, 32, 64, 16000),
    "generate_t5_4x256": partial(generate_t5, 256, 4, 16, 32, 64, 16000),
}
