"""Text: pre-training steps against `transformers`, tokenization against bare `tokenizers`.

Both sides of a ratio have the same shape, batch, precision and threads; each is warmed up, then
timed by turns, and the best of five is taken.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import Pair, best_rates, own_adamw, peer_adamw, stepper, turn, unit
from selfsup.batch import Vocabulary
from selfsup.methods.generative.causal_language import CausalLanguage
from selfsup.methods.generative.causal_language import Config as CausalConfig
from selfsup.methods.generative.masked_language import Config as MaskedConfig
from selfsup.methods.generative.masked_language import MaskedLanguage
from selfsup.models.transformer import Config, TransformerEncoder
from selfsup.training.device import pick_dtype

Models = tuple[Any, Any]  # ours and the peer
Step = Callable[[], None]


def masked(
    dim: int,
    layers: int,
    batch: int,
    time_: int,
    vocabulary: int,
    precision: str = "float32",
    times: int = 3,
) -> Pair:
    """MLM, tokens/s: our modern layout against BertForMaskedLM at the same width and depth.

    Args:
        dim, layers: the shape; a head is 64 wide.
        batch, time_: rows and their tokens.
        vocabulary: number of token ids.
        precision: float32, or bfloat16 for autocast on both sides.
        times: steps of a turn.
    """
    dtype = pick_dtype(precision, torch.device("cpu"))
    tokens = draw(batch, time_, vocabulary)
    ours = own_masked_step(own_masked(dim, layers, vocabulary), tokens, dtype)
    peer = peer_masked_step(peer_masked(dim, layers, vocabulary), tokens, dtype)
    rates = best_rates(turn(ours, times), turn(peer, times), tokens.numel())
    return *rates, unit("tokens", dtype)


def own_masked(dim: int, layers: int, vocabulary: int) -> MaskedLanguage:
    """Ours without dropout."""
    spec = Vocabulary(size=vocabulary, pad=0, unk=1, cls=2, sep=3, mask=4)
    model = Config(dim=dim, layers=layers, heads=dim // 64, dropout=0.0)
    return MaskedLanguage(MaskedConfig(), TransformerEncoder(model, spec), spec)


def peer_masked(dim: int, layers: int, vocabulary: int) -> nn.Module:
    """BertForMaskedLM without dropout, for rows of up to 512 tokens."""
    from transformers import BertConfig, BertForMaskedLM

    dropped = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    shape = {"hidden_size": dim, "num_hidden_layers": layers, "num_attention_heads": dim // 64}
    config = BertConfig(vocab_size=vocabulary, intermediate_size=4 * dim, **shape, **dropped)
    return BertForMaskedLM(config).train()


def own_masked_step(ours: MaskedLanguage, tokens: Tensor, dtype: torch.dtype) -> Step:
    """A step that corrupts the tokens anew."""
    generator = torch.Generator(tokens.device).manual_seed(0)
    return stepper(
        ours, own_adamw(ours), lambda: ours.loss({"tokens": tokens}, generator).loss, dtype
    )


def peer_masked_step(peer: nn.Module, tokens: Tensor, dtype: torch.dtype) -> Step:
    """A step on tokens that were corrupted once."""
    hidden = torch.rand(tokens.shape, device=tokens.device) < 0.15
    labels = torch.where(hidden, tokens, -100)
    corrupted = torch.where(hidden, 4, tokens)
    return stepper(
        peer, peer_adamw(peer), lambda: peer(input_ids=corrupted, labels=labels).loss, dtype
    )


def causal(dim: int, layers: int, batch: int, time_: int, vocabulary: int) -> Pair:
    """CLM, tokens/s: our modern layout against GPT2LMHeadModel at the same width and depth."""
    dtype = pick_dtype("auto", torch.device("cpu"))
    tokens = draw(batch, time_, vocabulary)
    models = causal_models(dim, layers, vocabulary, longest=time_)
    steps = [causal_step(model, tokens, dtype) for model in models]
    rates = best_rates(*map(turn, steps), tokens.numel())
    return *rates, unit("tokens", dtype)


def causal_models(dim: int, layers: int, vocabulary: int, longest: int) -> Models:
    """Both sides without dropout; no token ends a text."""
    from transformers import GPT2Config, GPT2LMHeadModel

    spec = Vocabulary(size=vocabulary, pad=0)
    shape = {"dim": dim, "layers": layers, "heads": dim // 64}
    model = Config(**shape, dropout=0.0, causal=True, activation="gelu_tanh")
    ours = CausalLanguage(CausalConfig(), TransformerEncoder(model, spec), spec)
    shape = {"n_embd": dim, "n_layer": layers, "n_head": dim // 64, "n_positions": longest}
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    peer = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **shape, **none, **ends))
    return ours, peer.train()


def causal_step(model: nn.Module, tokens: Tensor, dtype: torch.dtype) -> Step:
    """A step of either side: every token is predicted from those before it."""
    generator = torch.Generator(tokens.device).manual_seed(0)
    if isinstance(model, CausalLanguage):
        return stepper(
            model, own_adamw(model), lambda: model.loss({"tokens": tokens}, generator).loss, dtype
        )
    return stepper(
        model, peer_adamw(model), lambda: model(input_ids=tokens, labels=tokens).loss, dtype
    )


def draw(batch: int, time_: int, vocabulary: int) -> Tensor:
    """Rows of ordinary tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, vocabulary, (batch, time_), generator=generator)


def tokenization() -> Pair:
    """WordPiece, characters/s, of texts that are read for the first time; peer: `encode_batch`."""
    import json
    import lzma
    from pathlib import Path

    import tokenizers

    from selfsup.data.tokenizer import Tokenizer, TokenizerConfig

    path = Path(__file__).parent.parent / "demo" / "unlabeled" / "web.jsonl.xz"
    with lzma.open(path, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    ours = Tokenizer.train(TokenizerConfig(vocab_size=4000), texts)
    peer = tokenizers.Tokenizer.from_str(ours.to_json())
    amount = sum(map(len, texts))
    rates = best_rates(
        turn(lambda: Tokenizer(ours.to_json()).encode(texts, parse_special=False)),
        turn(lambda: peer.encode_batch(texts, add_special_tokens=False)),
        amount,
    )
    return *rates, "characters/s"


BENCHMARKS: dict[str, Callable[[], Pair]] = {
    "mlm_4x256": partial(masked, 256, 4, 32, 128, 30522),
    "mlm_4x256_bf16": partial(masked, 256, 4, 32, 128, 30522, "bfloat16", times=1),
    "mlm_12x768": partial(masked, 768, 12, 8, 128, 30522, times=1),
    "mlm_12x768_bf16": partial(masked, 768, 12, 8, 128, 30522, "bfloat16", times=1),
    "gpt_4x256": partial(causal, 256, 4, 16, 256, 16000),
    "tokenization": tokenization,
}
