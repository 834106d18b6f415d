"""The transformer: BERT's and GPT-2's published layouts, and small modern ones.

A stack of blocks (Vaswani et al., 2017, arXiv 1706.03762) over a `TokenEmbedding`, bidirectional or
causal. Post-norm with learned positions is BERT (Devlin et al., 2019, arXiv 1810.04805), pre-norm
with learned positions is GPT-2 (Radford et al., 2019), shared layers with a narrow table are ALBERT
(Lan et al., 2020, arXiv 1909.11942), experts in every second block are Switch (Fedus et al., 2021,
arXiv 2101.03961).

From the bottom up: `transformer_config.py` has the shape (`presets.toml` the published ones),
`embeddings.py` what a row enters as, `attention.py` and `experts.py` the parts of a block,
`block.py` the block, `view.py` what all of them share in a call, `vocabulary_head.py` the logits.
`encoder_decoder.py` makes two such stacks into one model.

Axes: batch, time, dim. Padding may stand on either side of a row. The last entry of
`Features.hidden` is after `final_norm`.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from selfsup.batch import AudioSpec, Batch, ImageSpec, SeriesSpec, Spec, Vocabulary
from selfsup.errors import ConfigError, DataError
from selfsup.models.attention import RelativeBias
from selfsup.models.block import Block, DecoderBlock
from selfsup.models.embeddings import (
    FrameEmbedding,
    InputEmbedding,
    PatchEmbedding,
    SeriesEmbedding,
    TokenEmbedding,
    document_positions,
    rotary_angles,
)
from selfsup.models.encoder import Encoder, Features, masked_mean
from selfsup.models.experts import Routing, summed
from selfsup.models.transformer_config import Config
from selfsup.models.view import Cache, Memory, Prefix, View, attention_mask, past
from selfsup.models.waveform import WaveformEmbedding


class TransformerEncoder(Encoder):
    """Tokens, patches, frames or series to `Features`, bidirectional or causal.

    Reads the field that its spec stands for and, where present, `mask`, `documents` and (with
    `segment_types`) `segments`.

    Attributes:
        embedding: of the kind that the spec asks for; in a `TokenEmbedding` `tokens.weight` is the
            table.
        layers: the blocks (one, when shared).
        final_norm, pooler: modules, or None where the configuration asks for none.
        prefix: gives the learned keys and values for a number of rows; set by prefix tuning.
        prompt: puts learned vectors before those of the items; set by the tuning of soft prompts.

    >>> encoder = TransformerEncoder(Config(dim=8, layers=2, heads=2), Vocabulary(size=100))
    >>> encoder({"tokens": torch.tensor([[5, 7, 2]])}).last.shape
    torch.Size([1, 3, 8])
    """

    reads = ("text", "image", "audio", "series")

    block: type[Block] = Block
    prefix: Callable[[int], Prefix | None] | None = None
    prompt: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]] | None = None

    def __init__(self, config: Config, spec: Spec):
        super().__init__()
        self.config, self.spec = config, spec
        self.dim, self.num_layers, self.causal = config.dim, config.layers, config.causal
        self.has_penalty = config.experts > 0
        self.embedding: Any = self.build_embedding()
        blocks = [self.block(config, i) for i in range(1 if config.share_layers else config.layers)]
        self.layers = nn.ModuleList(blocks)
        relative = config.heads, config.relative_buckets, config.relative_reach, config.causal
        self.relative = RelativeBias(*relative) if config.positions == "relative" else None
        ends_in_norm = config.norm == "pre" if config.final_norm is None else config.final_norm
        self.final_norm = config.build_norm(config.dim) if ends_in_norm else None
        self.pooler = nn.Linear(config.dim, config.dim) if config.pooling == "bert" else None
        initialise(self, config.init_std)
        if config.norm == "pre":  # GPT-2: the residual sum of 2 * layers terms keeps its variance
            std = config.init_std / (2 * config.layers) ** 0.5
            for block in blocks:
                ends = [block.attention.out.weight, block.feedforward.down.weight]
                if isinstance(block, DecoderBlock):
                    ends.append(block.cross.out.weight)
                for weight in ends:
                    nn.init.normal_(weight, std=std)

    def build_embedding(self) -> InputEmbedding:
        """The embedding of the kind that the spec asks for."""
        return build_embedding(self.config, self.spec)

    def forward(
        self,
        batch: Batch,
        cache: Cache | None = None,
        vectors: Tensor | None = None,
        memory: Memory | None = None,
        causal: bool | None = None,
        slots: Int[Tensor, "batch kept"] | None = None,
    ) -> Features:
        """Encodes one batch.

        Args:
            batch: the fields above.
            cache: what was read before; the new tokens go on from there and are added to it.
            vectors: (batch, time, width), taken instead of `embedding.vectors(batch)`: a method
                that hides positions puts its mask vector there.
            memory: for a decoder: what its encoder has read.
            causal: whether to hide the future in this call; None: as configured.
            slots: where the last layer's output is wanted: it is computed there alone, and `last`,
                `mask` and `pooled` are of these; None: everywhere.

        Raises:
            DataError: rows longer than the learned positions, or a cache with packed rows.
            ConfigError: a cache for a bidirectional model.
        """
        x, view, mask = self.begin(batch, cache, vectors, memory, causal)
        skip, hidden, routings = view.num_prompt, [], []
        for layer in range(self.num_layers):
            hidden.append(x[:, skip:] if skip else x)
            if slots is not None and layer == self.num_layers - 1 and not self.has_penalty:
                view = view.narrowed(slots + skip, x.shape[1])
            x, routing = self.step(x, view, layer)
            if routing is not None:
                routings.append(routing)
        x = self.end(x)
        if slots is not None:
            mask = mask.gather(1, slots + skip)
            x = x if view.slots is not None else x.take_along_dim((slots + skip).unsqueeze(2), 1)
        elif skip:
            x, mask = x[:, skip:], mask[:, skip:]
        penalty, metrics = summed(routings, self.config.balance_weight)
        return Features((*hidden, x), mask, self.pool(x, mask), penalty, metrics)

    def pooled(self, batch: Batch) -> Float[Tensor, "batch dim"]:
        """One vector of each row; where one slot gives it, the last layer leaves out the others."""
        if self.config.pooling == "mean":
            return self(batch).pooled
        vectors, real = self.embedding.vectors(batch), self.embedding.real(batch)
        mask = vectors.new_ones(vectors.shape[:2], dtype=torch.bool) if real is None else real
        return self(batch, vectors=vectors, slots=self._pooled_slot(mask).unsqueeze(1)).pooled

    def begin(
        self,
        batch: Batch,
        cache: Cache | None = None,
        vectors: Tensor | None = None,
        memory: Memory | None = None,
        causal: bool | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], View, Bool[Tensor, "batch time"]]:
        """What the first layer reads, what all layers share, and the mask; `forward` has the rest.

        Whoever goes through the layers one by one calls `begin`, `step` for each of them, `end`,
        and leaves out the first `View.num_prompt` slots.
        """
        causal = self.config.causal if causal is None else causal
        vectors = self.embedding.vectors(batch) if vectors is None else vectors
        documents, real = batch.get("documents"), self.embedding.real(batch)
        num_items = vectors.shape[1]
        if self.prompt is not None and (cache is None or cache.num_read == 0):
            self._check_prompted(documents)
            vectors, real = self.prompt(vectors, real)
        mask = vectors.new_ones(vectors.shape[:2], dtype=torch.bool) if real is None else real
        time, device = vectors.shape[1], vectors.device
        plain = real is None and documents is None
        known: Tensor | None = None if plain else mask  # of all that was read
        read = time
        if cache is not None:
            self._check_cached(documents, causal)
            known = cache.extend(mask, padded=real is not None)
            read = cache.num_read
        prefix = None if self.prefix is None else self.prefix(len(mask))
        shift = None if prefix is None else prefix.shift
        self.embedding.check_length(read if shift is None else read + int(shift.max()))
        allowed: Tensor | None = None
        if known is not None:
            positions = document_positions(known, documents)[:, -time:]
            allowed = attention_mask(known, documents, time, causal)
        else:  # nothing is padded; without a mask the kernels are fastest
            positions = torch.arange(read - time, read, device=device)
            if 1 < time < read:
                allowed = past(time, read, device)
        if shift is not None:
            positions = positions + shift
        x = self.embedding.place(vectors, positions, real)
        if self.relative is not None:
            allowed = self._with_distances(allowed, time, read, causal)
        in_kernel = causal and allowed is None and time == read
        if prefix is not None:
            allowed = prefix.seen(past(time, read, device) if in_kernel else allowed, read)
            in_kernel = False
        view = View(self._rotation(positions), allowed, in_kernel, cache, real, memory, prefix)
        if time != num_items:
            view = view._replace(num_prompt=time - num_items)
        return x, view, mask

    def step(
        self, x: Float[Tensor, "batch time dim"], view: View, layer: int
    ) -> tuple[Float[Tensor, "batch kept dim"], Routing | None]:
        """One layer, from 0 to `num_layers` - 1, and where its experts' tokens went."""
        return self.layers[layer % len(self.layers)](x, view, layer)

    def end(self, x: Float[Tensor, "batch kept dim"]) -> Float[Tensor, "batch kept dim"]:
        """What heads read of the last layer's output."""
        return x if self.final_norm is None else self.final_norm(x)

    def _with_distances(self, allowed: Tensor | None, time: int, read: int, causal: bool) -> Tensor:
        """What is added to the attention scores: numbers by distance, -inf where unseen."""
        assert self.relative is not None
        bias = self.relative(time, read)
        if allowed is None and causal and time > 1:
            allowed = past(time, read, bias.device)
        return bias if allowed is None else bias.masked_fill(~allowed, -torch.inf)

    def _check_cached(self, documents: Tensor | None, causal: bool) -> None:
        if not causal:
            raise ConfigError("a cache needs a causal model (model.causal = true)")
        if documents is not None:
            raise DataError("a cache takes one document per row; leave `documents` out")

    def _check_prompted(self, documents: Tensor | None) -> None:
        if documents is not None:
            raise DataError("a soft prompt takes one document per row; leave `documents` out")

    def _rotation(self, positions: Int[Tensor, "*batch time"]) -> tuple[Tensor, Tensor] | None:
        if self.config.positions != "rotary":
            return None
        return rotary_angles(positions, self.config.head_dim, self.config.rotary_base)

    def pool(
        self, x: Float[Tensor, "batch time dim"], mask: Bool[Tensor, "batch time"]
    ) -> Float[Tensor, "batch dim"]:
        """One vector of each row, as `pooling` says."""
        if self.config.pooling == "mean":
            return masked_mean(x, mask)
        row = x[torch.arange(len(x), device=x.device), self._pooled_slot(mask)]  # (batch, dim)
        return row if self.pooler is None else torch.tanh(self.pooler(row))

    def _pooled_slot(self, mask: Bool[Tensor, "batch time"]) -> Int[Tensor, " batch"]:
        """The first real one, or the last."""
        slot = torch.arange(mask.shape[1], device=mask.device)
        if self.config.pooling == "last":
            return torch.where(mask, slot, 0).amax(1)
        return torch.where(mask, slot, mask.shape[1] - 1).amin(1)


def build_embedding(config: Config, spec: Spec) -> InputEmbedding:
    """The embedding for the kind of data that `spec` stands for.

    Raises:
        ConfigError: a transformer does not read that kind.
    """
    options = {
        "width": config.embedding_width,
        "positions": config.positions,
        "max_length": config.max_length,
        "scale": config.embedding_std / config.init_std if config.embedding_std else 1.0,
        "norm": config.build_norm(config.embedding_width) if config.embedding_norm else None,
        "dropout": config.dropout,
    }
    match spec:
        case Vocabulary():
            return TokenEmbedding(spec.size, config.dim, config.segment_types, **options)
        case ImageSpec():
            return PatchEmbedding(spec, config.patch, config.dim, **options)
        case AudioSpec(mel=0):
            return _waveform_embedding(config, options)
        case AudioSpec():
            return FrameEmbedding(spec, config.patch, config.dim, **options)
        case SeriesSpec():
            return SeriesEmbedding(spec, config.patch, config.dim, **options)
    raise ConfigError(f"a transformer does not read {type(spec).__name__}; use model.name = 'mlp'")


def _waveform_embedding(config: Config, options: dict[str, Any]) -> WaveformEmbedding:
    if config.causal or config.embedding_width != config.dim:
        raise ConfigError(
            "waveforms are read from both sides and projected to model.dim: they need "
            "model.causal = false and model.embedding_dim = 0"
        )
    return WaveformEmbedding(
        config.dim,
        config.conv_channels,
        config.conv_kernels,
        config.conv_strides,
        config.conv_norm,
        config.conv_positions,
        **options,
    )


def initialise(module: nn.Module, std: float) -> None:
    """Normal(0, std) for linear layers and tables, zero for their biases, as BERT and GPT-2 do."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
