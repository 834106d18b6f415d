"""HuBERT: hidden stretches of sound are told by their cluster, first of MFCC, then of features.

Hsu, Bolte, Tsai, Lakhotia, Salakhutdinov and Mohamed, "HuBERT: Self-Supervised Speech
Representation Learning by Masked Prediction of Hidden Units" (2021, arXiv 2106.07447). K-means over
MFCC frames gives every step a first cluster; spans of steps are replaced by a learned vector, and
the encoder predicts the clusters there, by the cosine with a learned vector of each cluster. Later
the features of a middle layer are clustered, and make better targets.

Rounds: `refresh` clusters MFCC at step 0, and the features of layer `layer` after `refresh_every`
steps, once for each further number in `clusters`; then the clusters stay. A step's target is the
centre nearest to it when its batch is read: to its MFCC frame, later to the features of a teacher,
the encoder as it stood at the last `refresh`. So no label is stored for any example, held-out sound
has targets too, and a resumed run goes on with the same ones.

Axes: batch; time: steps of the encoder; item: a step that counts; frame: of MFCC, or chosen for
k-means; cluster; width of what is clustered; dim of what is compared.

Deviations from the paper:
- Targets are made as above, from the whole sound; the authors store them beforehand. From the
  second round on it costs one forward pass more.
- Training goes on with the same weights in every round; the authors begin anew. The vectors of the
  clusters are drawn anew, but keep the optimizer's moments.
- K-means sees `max_frames` steps drawn from all sounds, and is not in mini-batches.
- The mask vector stands before the front end's normalisation and linear map, as in `wav2vec2`.
- A step's MFCC frame is the one nearest to its middle, where steps are longer than frames.

Reference result: free spoken digits, 22 minutes of six voices, less than ten CPU minutes
(docs/results/hubert-small.json): the digit is told for a voice left out with accuracy 0.597 by a
linear probe; untrained 0.550, mean log-mel 0.534; one seed.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from selfsup.batch import AudioSpec, Batch
from selfsup.errors import ConfigError
from selfsup.methods.clustering import assign, kmeans
from selfsup.methods.ops import frozen
from selfsup.methods.spans import span_mask
from selfsup.models.quantizers import perplexity
from selfsup.models.recurrent import RecurrentEncoder
from selfsup.models.transformer import TransformerEncoder
from selfsup.objective import Objective, Output

MFCC_WIDTH = 39  # 13 coefficients, their slopes, and the slopes of those


@dataclass(frozen=True, kw_only=True)
class Config:
    """Clusters, masks, weights. Defaults are those of the paper's BASE model."""

    clusters: tuple[int, ...] = (100, 500)
    """Number of clusters in each round; the first is of MFCC, the others of features."""
    layer: int = 6
    """Whose features are clustered; 0 is the embedding."""
    refresh_every: int = 250_000
    """Steps in a round; the last one lasts until the end."""
    max_frames: int = 500_000
    """Most steps that k-means sees."""
    iterations: int = 20
    """Of k-means."""
    start_probability: float = 0.08
    """Share of steps at which a hidden span starts; spans overlap, so about half is hidden."""
    span: int = 10
    """Steps in a span: 200 ms of a waveform."""
    unmasked_weight: float = 0.0
    """What a step that is not hidden weighs; a hidden one weighs 1."""
    projection_dim: int = 256
    """Width in which steps and clusters are compared."""
    temperature: float = 0.1
    """Divides the cosines."""
    feature_penalty: float = 10.0
    """Weight of the mean square of what the front end gives."""
    front_end_gradient: float = 0.1
    """Factor on the gradient that reaches the front end."""

    def __post_init__(self) -> None:
        if not self.clusters or min(self.clusters) < 2:
            raise ValueError(f"clusters must be numbers of at least 2, got {self.clusters}")
        counts = ("refresh_every", "max_frames", "iterations", "span", "projection_dim")
        for name, least in {**dict.fromkeys(counts, 1), "layer": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.start_probability <= 1:
            raise ValueError(
                f"start_probability must be above 0 and at most 1, got {self.start_probability}"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        for name in ("unmasked_weight", "feature_penalty", "front_end_gradient"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


def cluster_logits(
    projected: Float[Tensor, "item dim"], codes: Float[Tensor, "cluster dim"], temperature: float
) -> Float[Tensor, "item cluster"]:
    """Cosines of each item with the vector of each cluster, over the temperature (equation 3)."""
    with torch.autocast(projected.device.type, enabled=False):  # it would round the cosines
        items, clusters = F.normalize(projected.float(), dim=1), F.normalize(codes.float(), dim=1)
        return items @ clusters.T / temperature


def weighted_cross_entropy(
    logits: Float[Tensor, "item cluster"],
    target: Int[Tensor, " item"],
    weight: Float[Tensor, " item"],
) -> Float[Tensor, ""]:
    """Mean over the items by their weight (equation 1); 0 where there is none."""
    each = F.cross_entropy(logits, target, reduction="none")
    return (weight * each).sum() / weight.sum().clamp(min=1e-9)


def mean_square(
    vectors: Float[Tensor, "batch time width"], real: Bool[Tensor, "batch time"]
) -> Float[Tensor, ""]:
    """Mean over the real steps and over width, in float32."""
    squares = vectors.float().square().mean(-1)
    return torch.where(real, squares, 0.0).sum() / real.sum().clamp(min=1)


def frame_of_step(num_steps: int, step_hop: int, frame_hop: int) -> Int[Tensor, " {num_steps}"]:
    """For each step the frame whose middle is nearest to its own, the earlier of two.

    A step is taken to last `step_hop` samples, a frame `frame_hop`; both begin at sample 0.

    >>> frame_of_step(4, step_hop=320, frame_hop=160).tolist()
    [0, 2, 4, 6]
    >>> frame_of_step(3, step_hop=240, frame_hop=80).tolist()
    [1, 4, 7]
    """
    begins = torch.arange(num_steps) * step_hop
    return ((begins + (step_hop - frame_hop) // 2) // frame_hop).clamp(min=0)


def draw_frames(
    parts: Iterable[Float[Tensor, "_ width"]], most: int, generator: torch.Generator
) -> Float[Tensor, "frame width"]:
    """At most `most` rows of all parts, each with the same probability; holds twice as many.

    Args:
        parts: rows that come part by part.
        most: how many to give.
        generator: source of randomness, on the device of `parts`.
    """
    kept: list[Tensor] = []
    keys: list[Tensor] = []
    bound = 1.0  # a key from here on is not among the smallest
    for part in parts:
        key = torch.rand(len(part), generator=generator, device=part.device)
        kept.append(part[key < bound])
        keys.append(key[key < bound])
        if sum(map(len, keys)) > 2 * most:
            kept, keys = _smallest(kept, keys, most)
            bound = float(keys[0].max())
    return _smallest(kept, keys, most)[0][0]


def _smallest(
    rows: list[Tensor], keys: list[Tensor], most: int
) -> tuple[list[Tensor], list[Tensor]]:
    joined, key = torch.cat(rows), torch.cat(keys)
    chosen = key.argsort(stable=True)[:most].sort().values  # in the order of the data
    return [joined[chosen]], [key[chosen]]


@final
class HuBERT(Objective):
    """Predicts the clusters of hidden steps; see the module's docstring.

    Attributes:
        round: how often the clusters were made; before the first time they are random.
        mfcc_centroids: (clusters[0], 39) of the first round.
        layer_centroids: (most of the other clusters, width of the encoder) of the last round; the
            first ones are in use.
        codes: (most clusters, projection_dim) learned vectors; the first ones are in use.
        teacher: the encoder as it stood at the last `refresh`; None if there is one round.
        mask_vector: (width,) stands where a step is hidden.

    Raises:
        ConfigError: the encoder has no layer `layer`.

    >>> from selfsup.models.transformer import Config as Model
    >>> spec = AudioSpec(rate=8000, mel=4, hop=80)
    >>> encoder = TransformerEncoder(Model(dim=8, layers=1, heads=2, patch=1), spec)
    >>> method = HuBERT(Config(layer=1, start_probability=1.0), encoder, spec)
    >>> batch = {"frames": torch.randn(2, 20, 4), "mfcc": torch.randn(2, 20, 39)}
    >>> int(method.loss(batch, torch.Generator()).weight)
    40
    """

    fields: tuple[str, ...] = ("mfcc",)
    encoder: RecurrentEncoder | TransformerEncoder
    round: Tensor
    mfcc_centroids: Tensor
    layer_centroids: Tensor

    def __init__(
        self, config: Config, encoder: RecurrentEncoder | TransformerEncoder, spec: AudioSpec
    ):
        super().__init__()
        if config.layer > encoder.num_layers:
            raise ConfigError(
                f"method.layer = {config.layer}: the encoder has layers up to {encoder.num_layers} "
                "(model.layers)"
            )
        self.config, self.encoder, self.spec = config, encoder, spec
        self.fields = (encoder.embedding.field, "mfcc")
        self.refresh_every = config.refresh_every
        self.mask_vector = nn.Parameter(torch.rand(encoder.embedding.width))
        self.head = nn.Linear(encoder.dim, config.projection_dim)
        self.codes = nn.Parameter(torch.randn(max(config.clusters), config.projection_dim))
        first, later = config.clusters[0], config.clusters[1:]
        self.teacher = frozen(copy.deepcopy(encoder)) if later else None
        self.register_buffer("round", torch.zeros((), dtype=torch.long))
        self.register_buffer("mfcc_centroids", torch.randn(first, MFCC_WIDTH))
        self.register_buffer("layer_centroids", torch.zeros(max(later, default=0), encoder.dim))

    def train(self, mode: bool = True) -> "HuBERT":
        """As in every module, but the teacher stays without dropout."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        """Finds clusters, hides, encodes, predicts; `weight` is that of the steps that count."""
        config, real = self.config, self._real(batch)
        rate = config.start_probability * config.span
        hidden = span_mask(real, rate, config.span, generator, min_masks=2)
        target = self.targets(batch)  # (batch, time)
        vectors = self.encoder.embedding.vectors(batch)
        vectors = vectors.detach() + config.front_end_gradient * (vectors - vectors.detach())
        shown = torch.where(hidden.unsqueeze(-1), self.mask_vector.to(vectors.dtype), vectors)
        last = self.encoder(batch, vectors=shown).last
        counts = real if config.unmasked_weight else hidden  # (batch, time)
        weight = torch.where(hidden, 1.0, config.unmasked_weight)[counts]  # (item,)
        codes = self.codes[: self._num_clusters()]
        logits = cluster_logits(self.head(last[counts]), codes, config.temperature)
        prediction_loss = weighted_cross_entropy(logits, target[counts], weight)
        loss = prediction_loss + config.feature_penalty * mean_square(vectors, real)
        hit = (logits.detach().argmax(1) == target[counts]) & hidden[counts]
        occurs = torch.bincount(target[real], minlength=len(codes)).float()
        metrics = {
            "prediction_loss": prediction_loss.detach(),
            "accuracy": hit.sum() / hidden.sum().clamp(min=1),
            "target_perplexity": perplexity(occurs),
            "round": self.round.float(),
        }
        return Output(loss, weight.sum(), metrics)

    @torch.no_grad()
    def targets(self, batch: Batch) -> Int[Tensor, "batch time"]:
        """The cluster of every step; those of padding mean nothing."""
        features = self._clustered(batch, self._round())
        found = assign(features.flatten(0, 1), self._centroids(self._round()))
        return found.view(features.shape[:2])

    @torch.no_grad()
    def refresh(self, batches: Iterable[Batch], generator: torch.Generator) -> None:
        """Goes on to the next round, if there is one.

        Raises:
            ConfigError: there are fewer steps than clusters.
        """
        if int(self.round) == len(self.config.clusters):
            return
        self.round.add_(1)
        number = self._round()
        if self.teacher is not None:
            self.teacher.load_state_dict(self.encoder.state_dict())
        frames = draw_frames(
            self._real_features(batches, number), self.config.max_frames, generator
        )
        clusters = self._num_clusters()
        self._centroids(number).copy_(kmeans(frames, clusters, generator, self.config.iterations))
        self.codes.normal_(generator=generator)

    def _real_features(self, batches: Iterable[Batch], number: int) -> Iterator[Tensor]:
        """(step, width) of each batch, float32."""
        for batch in batches:
            yield self._clustered(batch, number)[self._real(batch)].float()

    def _clustered(self, batch: Batch, number: int) -> Tensor:
        """What is clustered in a round, (batch, time, width)."""
        if number > 1:
            assert self.teacher is not None
            return self.teacher(batch).hidden[self.config.layer]
        mfcc, hop = batch["mfcc"], self.encoder.embedding.hop
        frame = frame_of_step(self._real(batch).shape[1], hop, self.spec.hop)
        return mfcc[:, frame.clamp(max=mfcc.shape[1] - 1).to(mfcc.device)]

    def _round(self) -> int:
        return max(1, int(self.round))  # waits for the device, as choosing the hidden steps does

    def _num_clusters(self) -> int:
        return self.config.clusters[self._round() - 1]

    def _centroids(self, number: int) -> Tensor:
        if number == 1:
            return self.mfcc_centroids
        return self.layer_centroids[: self.config.clusters[number - 1]]

    def _real(self, batch: Batch) -> Tensor:
        """(batch, time) True at the real steps, also where the batch has no mask."""
        content = batch[self.encoder.embedding.field]
        everywhere = content.new_ones(content.shape[:2], dtype=torch.bool)
        return self.encoder.embedding.real({"mask": batch.get("mask", everywhere)})
