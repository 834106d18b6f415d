"""The encoder-decoder transformer: one stack reads a source, the other writes a target.

Vaswani et al., 2017 (arXiv 1706.03762). With learned positions and post-norm it is BART (Lewis et
al., 2019, arXiv 1910.13461), with relative positions, pre-norm and no biases T5 (Raffel et al.,
2019, arXiv 1910.10683), with experts the Switch Transformer (Fedus et al., 2021, arXiv 2101.03961).
Both stacks and the output share one token table. As an `Encoder` it is its reading half: `embed`
and the tasks that need no decoder see the source's hidden states.

Axes: batch; source: tokens read; time: tokens written; dim; vocabulary.

T5's table has unit variance, and its output is divided by sqrt(dim). Here the table's standard
deviation is 1 / sqrt(dim), and `embedding_std = 1` multiplies what enters: the same function.
"""

from dataclasses import dataclass, fields
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from selfsup.batch import Batch, Vocabulary
from selfsup.errors import ConfigError
from selfsup.models import transformer
from selfsup.models.block import DecoderBlock
from selfsup.models.embeddings import InputEmbedding, TokenEmbedding
from selfsup.models.encoder import Encoder, Features
from selfsup.models.transformer import TransformerEncoder
from selfsup.models.view import Cache, Memory
from selfsup.models.vocabulary_head import Projection


@dataclass(frozen=True, kw_only=True)
class Config(transformer.Config):
    """The shape of both stacks; keys that are not here are those of `transformer.Config`."""

    decoder_layers: int = 0  # 0: as many as `layers`
    start: Literal["sep", "cls", "pad"] = "sep"  # the token that a target begins after
    tied: bool = True  # the output's weights are the token table

    def __post_init__(self):
        super().__post_init__()
        if self.decoder_layers < 0:
            raise ValueError(f"decoder_layers must not be negative, got {self.decoder_layers}")
        if self.causal:
            raise ValueError("the encoder reads both sides: causal must be false")
        if self.embedding_dim not in (0, self.dim):
            raise ValueError(
                f"both stacks read the table as it is: embedding_dim must be 0, got "
                f"{self.embedding_dim}"
            )

    def of_decoder(self) -> transformer.Config:
        """The shape of the writing stack."""
        shape = {f.name: getattr(self, f.name) for f in fields(transformer.Config)}
        shape |= {"causal": True, "layers": self.decoder_layers or self.layers}
        shape |= {"heads_left": (), "feedforward_left": ()}  # those are of the reading stack
        return transformer.Config(**{**shape, "segment_types": 0, "pooling": "last"})


class Places(InputEmbedding):
    """Positions alone: the decoder is given vectors of the shared table."""

    field = "tokens"

    def __init__(self, config: transformer.Config):
        super().__init__()
        self.build_places(
            config.dim,
            positions=config.positions,
            max_length=config.max_length,
            scale=config.embedding_std / config.init_std if config.embedding_std else 1.0,
            norm=config.build_norm(config.dim) if config.embedding_norm else None,
            dropout=config.dropout,
        )


class TransformerDecoder(TransformerEncoder):
    """The writing stack: causal, and each block also looks at the memory."""

    block = DecoderBlock

    def build_embedding(self) -> InputEmbedding:
        """Positions; the vectors come from outside."""
        return Places(self.config)


class EncoderDecoder(Encoder):
    """Reads `tokens` as an encoder, writes others with `decode`.

    Attributes:
        source: the reading stack; its `embedding.tokens` is the shared table.
        target: the writing stack.
        output: the output's own weights, or None where they are the table's.
        start: id of the token that a target begins after.

    >>> import torch
    >>> model = EncoderDecoder(Config(dim=8, layers=1, heads=2), Vocabulary(size=100, sep=3))
    >>> read = model({"tokens": torch.tensor([[5, 7, 2]])})
    >>> model.decode(torch.tensor([[3, 9]]), read).last.shape
    torch.Size([1, 2, 8])
    """

    reads = ("text",)

    def __init__(self, config: Config, spec: Vocabulary):
        super().__init__()
        self.config, self.spec = config, spec
        self.dim, self.num_layers = config.dim, config.layers
        self.has_penalty = config.experts > 0
        self.start = getattr(spec, config.start)
        if self.start < 0:
            raise ConfigError(
                f"model.start = {config.start!r}, and the tokenizer has no such token; use 'sep'"
            )
        self.source = TransformerEncoder(config, spec)
        self.target = TransformerDecoder(config.of_decoder(), spec)
        self.output = None if config.tied else nn.Linear(config.dim, spec.size, bias=False)
        if self.output is not None:
            nn.init.normal_(self.output.weight, std=config.init_std)

    @property
    def embedding(self) -> TokenEmbedding:
        """The reading stack's embedding, with the shared table."""
        return self.source.embedding

    def forward(self, batch: Batch) -> Features:
        """Reads a batch: `tokens` and, where present, `mask`, `documents`, `segments`."""
        return self.source(batch)

    def decode(
        self,
        tokens: Int[Tensor, "batch time"],
        read: Features | None,
        mask: Bool[Tensor, "batch time"] | None = None,
        cache: Cache | None = None,
    ) -> Features:
        """Hidden states of the writing stack, each knowing the source and the tokens up to it.

        Args:
            tokens: what is written already, `start` first: see `shifted`. With a cache only the new
                ones.
            read: from `forward`; a cache keeps what its first call was given.
            mask: True where a token is real; None: everywhere.
            cache: of this target, made empty for its first call.

        Returns:
            hidden states of the target; `penalty` and `metrics` are those of this stack alone.
        """
        batch = {"tokens": tokens} if mask is None else {"tokens": tokens, "mask": mask}
        if cache is None or cache.memory is None:
            assert read is not None
            memory = Memory(read.last, read.mask[:, None, None])
        else:
            memory = cache.memory
        if cache is not None:
            cache.memory = memory
        vectors = self.embedding.tokens(tokens)  # (batch, time, dim)
        return self.target(batch, cache, vectors, memory)

    def shifted(self, target: Int[Tensor, "batch time"]) -> Int[Tensor, "batch time"]:
        """What the decoder reads to write `target`: one place to the right, `start` first."""
        return F.pad(target[:, :-1], (1, 0), value=self.start)

    def logits(self, hidden: Float[Tensor, "*items dim"]) -> Float[Tensor, "*items vocabulary"]:
        """Scores of every token, in the autocast precision."""
        return self.project(hidden).logits

    def project(self, hidden: Float[Tensor, "*items dim"]) -> Projection:
        """The product that gives the logits, not yet carried out."""
        table = self.embedding.tokens if self.output is None else self.output
        return Projection(hidden, table.weight)
