"""Attention scores of a transformer's layers, which its kernels never form: computed beside them.

For distillation (TinyBERT, Jiao et al. 2019, arXiv 1909.10351, section 3.1) and for looking at
attention.

Axes: batch; query: positions that look; read: positions that are looked at; heads; head_dim.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from selfsup.models.attention import Attention
from selfsup.models.embeddings import rotate
from selfsup.models.encoder import Encoder
from selfsup.models.view import View, past


@contextmanager
def attention_scores(encoder: Encoder, layers: Collection[int]) -> Iterator[dict[int, Tensor]]:
    """While it lasts, a forward pass leaves the scores of the named layers here, by number from 0.

    Each is (batch, heads, query, read) float32, before the softmax, and carries a gradient where
    the pass does: queries and keys times 1 / sqrt(head_dim), turned where positions are rotary,
    with the numbers of relative ones, and -inf where nothing may be seen.

    >>> from selfsup.batch import Vocabulary
    >>> from selfsup.models.transformer import Config, TransformerEncoder
    >>> encoder = TransformerEncoder(Config(dim=8, layers=2, heads=2), Vocabulary(size=100))
    >>> with attention_scores(encoder, [1]) as scores:
    ...     _ = encoder({"tokens": torch.tensor([[5, 7, 2]])})
    >>> scores[1].shape
    torch.Size([1, 2, 3, 3])
    """
    found: dict[int, Tensor] = {}

    def keep(module: nn.Module, inputs: tuple, _: Tensor) -> None:
        assert isinstance(module, Attention)
        x, view, layer = inputs
        if layer in layers:
            found[layer] = scores_of(module, x, view)

    modules = [part for part in encoder.modules() if isinstance(part, Attention)] if layers else []
    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def scores_of(
    attention: Attention, x: Float[Tensor, "batch query dim"], view: View
) -> Float[Tensor, "batch heads query read"]:
    """The scores of one layer, as its forward pass uses them; `view` has no cache."""
    qkv = attention.qkv(x).unflatten(-1, (3, attention.heads, -1))
    queries, keys, _ = qkv.permute(2, 0, 3, 1, 4)  # (batch, heads, query, head_dim)
    if view.rotation is not None:
        queries, keys = rotate(queries, *view.rotation), rotate(keys, *view.rotation)
    scores = (queries @ keys.transpose(-1, -2)).float() * queries.shape[-1] ** -0.5
    allowed = view.allowed
    if view.prefix is not None and allowed is not None:
        allowed = allowed[..., -x.shape[1] :]  # what a tuning put in front is left out
    if attention.kept is not None and allowed is not None:
        allowed = allowed[:, attention.kept]
    if view.causal:
        allowed = past(x.shape[1], x.shape[1], x.device)
    if allowed is None:
        return scores
    if allowed.dtype == torch.bool:
        return scores.masked_fill(~allowed, -torch.inf)
    return scores + allowed
