"""Text: pre-training steps against `transformers`, tokenization against bare `tokenizers`.

Both sides of a ratio have the same shape, batch, precision and threads; each is warmed up, then
timed by turns, and the best of three is taken.
"""

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.timing import Pair, best_rates, stepper, turn
from selfsup.batch import Vocabulary
from selfsup.methods.generative.causal_language import CausalLanguage
from selfsup.methods.generative.causal_language import Config as CausalConfig
from selfsup.methods.generative.masked_language import Config as MaskedConfig
from selfsup.methods.generative.masked_language import MaskedLanguage
from selfsup.models.transformer import Config, TransformerEncoder
from selfsup.training.device import pick_dtype
from selfsup.training.optim import adamw


def masked(dim: int, layers: int, batch: int, time_: int, vocabulary: int) -> Pair:
    """MLM, tokens/s: our modern layout against BertForMaskedLM at the same width and depth."""
    from transformers import BertConfig, BertForMaskedLM

    dtype = pick_dtype("auto", torch.device("cpu"))
    spec = Vocabulary(size=vocabulary, pad=0, unk=1, cls=2, sep=3, mask=4)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, vocabulary, (batch, time_), generator=generator)
    model = Config(dim=dim, layers=layers, heads=dim // 64, dropout=0.0)
    ours = MaskedLanguage(MaskedConfig(), TransformerEncoder(model, spec), spec)
    dropped = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    shape = {"hidden_size": dim, "num_hidden_layers": layers, "num_attention_heads": dim // 64}
    peer = BertForMaskedLM(
        BertConfig(vocab_size=vocabulary, intermediate_size=4 * dim, **shape, **dropped)
    ).train()
    labels = torch.where(torch.rand(tokens.shape, generator=generator) < 0.15, tokens, -100)
    corrupted = torch.where(labels >= 0, 4, tokens)
    rates = best_rates(
        turn(
            stepper(
                ours, _adamw(ours), lambda: ours.loss({"tokens": tokens}, generator).loss, dtype
            )
        ),
        turn(
            stepper(
                peer,
                torch.optim.AdamW(peer.parameters(), lr=1e-4),
                lambda: peer(input_ids=corrupted, labels=labels).loss,
                dtype,
            )
        ),
        tokens.numel(),
    )
    return *rates, f"tokens/s, {str(dtype).removeprefix('torch.')}"


def causal(dim: int, layers: int, batch: int, time_: int, vocabulary: int) -> Pair:
    """CLM, tokens/s: our modern layout against GPT2LMHeadModel at the same width and depth."""
    from transformers import GPT2Config, GPT2LMHeadModel

    dtype = pick_dtype("auto", torch.device("cpu"))
    spec = Vocabulary(size=vocabulary, pad=0, sep=0)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, vocabulary, (batch, time_), generator=generator)
    model = Config(
        dim=dim, layers=layers, heads=dim // 64, dropout=0.0, causal=True, activation="gelu_tanh"
    )
    ours = CausalLanguage(CausalConfig(), TransformerEncoder(model, spec), spec)
    shape = {"n_embd": dim, "n_layer": layers, "n_head": dim // 64, "n_positions": time_}
    dropped = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    peer = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **shape, **dropped)).train()
    rates = best_rates(
        turn(
            stepper(
                ours, _adamw(ours), lambda: ours.loss({"tokens": tokens}, generator).loss, dtype
            )
        ),
        turn(
            stepper(
                peer,
                torch.optim.AdamW(peer.parameters(), lr=1e-4),
                lambda: peer(input_ids=tokens, labels=tokens).loss,
                dtype,
            )
        ),
        tokens.numel(),
    )
    return *rates, f"tokens/s, {str(dtype).removeprefix('torch.')}"


def _adamw(objective) -> torch.optim.Optimizer:
    return adamw(objective, lr=1e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)


def tokenization() -> Pair:
    """WordPiece, characters/s: `Tokenizer.encode` against bare `encode_batch`."""
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
        turn(lambda: ours.encode(texts)),
        turn(lambda: peer.encode_batch(texts, add_special_tokens=False)),
        amount,
    )
    return *rates, "characters/s"


BENCHMARKS: dict[str, Callable[[], Pair]] = {
    "mlm 4x256, 32 x 128, 30k words": partial(masked, 256, 4, 32, 128, 30522),
    "gpt 4x256, 16 x 256, 16k words": partial(causal, 256, 4, 16, 256, 16384),
    "tokenization": tokenization,
}
