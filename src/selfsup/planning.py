"""What a model costs before it is trained: parameters, FLOPs, memory, days.

The model is built on the meta device, where tensors have shapes and no content, so counting the
parameters of a trillion takes seconds. FLOPs are counted in one forward pass over such a row (a
multiply-add is two); the backward pass costs twice as much again. Memory follows mixed-precision
training (16 bytes a parameter with Adam, Rajbhandari et al. 2019, arXiv 1910.02054, section 3.1;
another optimizer keeps other moments) and the activations of a transformer layer (Korthikanti et
al. 2022, arXiv 2205.05198, section 4.1, with attention that keeps no scores). Time is FLOPs over
the devices' peak times the share of it that is reached.

`plans.toml` names published models, `hardware.toml` accelerators.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from selfsup import config as configuration
from selfsup import registry
from selfsup.batch import Vocabulary
from selfsup.errors import ConfigError, nearest
from selfsup.models.encoder import Encoder
from selfsup.models.encoder_decoder import EncoderDecoder
from selfsup.models.experts import Experts
from selfsup.training.config import Optimizer
from selfsup.training.optim import num_moments

FOLDER = Path(__file__).parent
WEIGHT_BYTES, GRADIENT_BYTES = 2, 2  # 16-bit
COPY_BYTES, MOMENT_BYTES = 4, 4  # what the optimizer keeps in float32: the weights, its moments
LAYER_BYTES = 34  # kept per position and width of a layer for the backward pass, in 16 bits
CHECKPOINT_BYTES = 2  # the same when a layer keeps its input alone


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a model is spread over devices.

    Attributes:
        devices: all of them; tensor * pipeline devices hold one copy of the model, and the copies
            read different data.
        tensor: devices that share every matrix (Megatron's layout).
        pipeline: devices that hold consecutive layers.
        experts: devices that share a layer's experts; 0: as many as there are copies.
        sharding: what copies keep only a share of: nothing, the optimizer's state, or weights and
            gradients as well (ZeRO 1 and 3, FSDP).
        micro_batch: rows that a copy reads at once.
        checkpointing: layers keep their inputs alone and compute the rest again: a third forward
            pass for less memory.
        utilisation: share of the peak that training reaches.
    """

    devices: int = 1
    tensor: int = 1
    pipeline: int = 1
    experts: int = 0
    sharding: Literal["none", "optimizer", "full"] = "none"
    micro_batch: int = 1
    checkpointing: bool = False
    utilisation: float = 0.4

    def __post_init__(self) -> None:
        for name in ("devices", "tensor", "pipeline", "micro_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1")
        if not 0 < self.utilisation <= 1:
            raise ConfigError(
                f"--utilisation must be above 0 and at most 1, got {self.utilisation}"
            )
        if self.devices % (self.tensor * self.pipeline):
            raise ConfigError(
                f"one copy takes tensor * pipeline = {self.tensor * self.pipeline} devices, which "
                f"do not divide {self.devices}"
            )
        if self.experts and self.copies % self.experts:
            raise ConfigError(
                f"--experts {self.experts} does not divide the {self.copies} copies of the model"
            )

    @property
    def copies(self) -> int:
        """Copies of the model that read different data."""
        return self.devices // (self.tensor * self.pipeline)


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device: its peak in 16 bits and its memory (10^9 bytes)."""

    tflops: float
    gigabytes: float
    summary: str = ""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to plan for, and how it is trained.

    Attributes:
        name: of the plan or recipe.
        model, keys: name and configuration of the model.
        vocabulary: token ids; 0 where the count is without any.
        row_length: tokens of a row.
        predicted: share of the positions whose logits are computed.
        tokens: of the whole training.
        optimizer: its moments take memory.
        published: parameters as published; 0: none are.
        source: where the numbers come from.
    """

    name: str
    model: str
    keys: dict[str, Any]
    vocabulary: int
    row_length: int
    predicted: float
    tokens: float
    optimizer: Optimizer = "adamw"
    published: float = 0.0
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a model is made of.

    Attributes:
        asked: the model, and how it is trained.
        parameters: all of them; `expert_parameters` are those of experts, `active_parameters` those
            that one token meets.
        moments: numbers that the optimizer keeps.
        forward_flops: of one pass, per token read.
        dim, inner: width of the hidden states and of the feed-forward layers.
        layers: of all stacks.
    """

    asked: Subject
    parameters: int
    expert_parameters: int
    active_parameters: int
    moments: int
    forward_flops: float
    dim: int
    inner: int
    layers: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What it costs. FLOPs are those of training; bytes are per device."""

    name: str
    parameters: int
    published: float
    expert_parameters: int
    active_parameters: int
    flops_per_token: float
    weight_bytes: float
    optimizer_bytes: float
    activation_bytes: float
    available_bytes: float
    tokens: float
    days: float

    @property
    def bytes_per_device(self) -> float:
        """All that a device holds."""
        return self.weight_bytes + self.optimizer_bytes + self.activation_bytes

    @property
    def fits(self) -> bool:
        """Whether a device holds it."""
        return self.bytes_per_device <= self.available_bytes


def names() -> dict[str, dict[str, Any]]:
    """The named plans."""
    return configuration.read_toml(FOLDER / "plans.toml")


def hardware(name: str) -> Hardware:
    """One accelerator of hardware.toml.

    Raises:
        ConfigError: no such accelerator; the nearest one is named.
    """
    known = configuration.read_toml(FOLDER / "hardware.toml")
    if name not in known:
        raise ConfigError(
            f"unknown hardware {name!r}{nearest(name, known)}; or give --tflops and --gigabytes"
        )
    return Hardware(**known[name])


def subject(name: str, settings: dict[str, Any] | None = None) -> Subject:
    """A named plan, or a recipe of text.

    Args:
        name: a name of plans.toml, a recipe, or a .toml file.
        settings: changes to the model, {"model.layers": 24}; for a recipe to all of it.

    Raises:
        ConfigError: an unknown name, or a recipe that does not read text.
    """
    known = names()
    if name in known:
        values = known[name]
        keys = configuration.preset_values(values["model"], values.pop("preset"))
        section = configuration.overridden({"model": keys}, settings or {})
        return Subject(name=name, keys=section["model"], **values)
    if name not in registry.recipe_paths() and not name.endswith(".toml"):
        raise ConfigError(
            f"unknown plan or recipe {name!r}{nearest(name, [*known, *registry.recipe_paths()])}"
        )
    values = configuration.overridden(configuration.recipe_values(name), settings or {})
    config = configuration.run_config(values)
    if config.data_name != "text":
        raise ConfigError(f"plan knows recipes of text, and {name} reads {config.data_name}")
    row, training = config.data.row_length, config.training
    masked = getattr(config.method, "mask_rate", 1.0)
    per_step = training.batch_size * row
    return Subject(
        name=name,
        model=config.model_name,
        keys=configuration.to_mapping(config.model),
        vocabulary=config.data.tokenizer.vocab_size,
        row_length=row,
        predicted=masked,
        tokens=float(per_step * (training.steps or 0)),
        optimizer=training.optimizer,
    )


def count(asked: Subject) -> Counts:
    """Builds the model without content, and counts.

    Raises:
        ConfigError: the configuration makes no model.
    """
    model = build(asked)
    total = sum(p.numel() for p in model.parameters())
    of_experts = [
        (part.experts, p.numel())
        for part in model.modules()
        if isinstance(part, Experts)
        for p in (part.up.weight, part.down.weight)
    ]
    try:
        forward = forward_flops(model, asked)
    except NotImplementedError:  # a model whose work depends on the content: ELMo, small enough
        forward = forward_flops(build(asked, "cpu"), asked)
    writing = model.target.num_layers if isinstance(model, EncoderDecoder) else 0
    return Counts(
        asked=asked,
        parameters=total,
        expert_parameters=sum(size for _, size in of_experts),
        active_parameters=total - sum(size - size // number for number, size in of_experts),
        moments=sum(num_moments(p.shape, asked.optimizer) for p in model.parameters()),
        forward_flops=forward,
        dim=model.dim,
        inner=getattr(model.config, "feedforward_width", 4 * model.dim),
        layers=model.num_layers + writing,
    )


def plan(counts: Counts, layout: Layout, device: Hardware) -> Plan:
    """What training costs on these devices in this layout."""
    asked = counts.asked
    per_token = counts.forward_flops * (4 if layout.checkpointing else 3)
    weights, optimizer = _state_bytes(counts, layout)
    speed = layout.devices * device.tflops * 1e12 * layout.utilisation
    return Plan(
        name=asked.name,
        parameters=counts.parameters,
        published=asked.published,
        expert_parameters=counts.expert_parameters,
        active_parameters=counts.active_parameters,
        flops_per_token=per_token,
        weight_bytes=weights,
        optimizer_bytes=optimizer,
        activation_bytes=_activation_bytes(counts, layout),
        available_bytes=device.gigabytes * 1e9,
        tokens=asked.tokens,
        days=asked.tokens * per_token / speed / 86400,
    )


def build(asked: Subject, device: str = "meta") -> Encoder:
    """The model; on the meta device without content, which takes no time."""
    module = registry.module_of(registry.MODELS, "model", asked.model)
    config = configuration.from_mapping(module.Config, asked.keys, "model")
    encoder = registry.resolve(registry.MODELS, "model", asked.model)
    size = max(asked.vocabulary, 8)
    spec = Vocabulary(size=size, pad=0, unk=1, cls=2, sep=3, mask=4, spellings=(b"x",) * size)
    with torch.device(device):
        return encoder(config, spec)


def forward_flops(model: Encoder, asked: Subject) -> float:
    """FLOPs of one forward pass, per token read, output included.

    An encoder-decoder writes as many tokens as it reads.
    """
    # enough rows that the rounded room of an expert is about its share
    rows = max(1, 16 * getattr(model.config, "experts", 0) // asked.row_length)
    device = next(model.parameters()).device
    tokens = torch.zeros(rows, asked.row_length, dtype=torch.long, device=device)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        read = model.train()({"tokens": tokens})
        if isinstance(model, EncoderDecoder):
            model.decode(tokens, read)
    total = float(counter.get_total_flops()) / tokens.numel()
    for part in model.modules():  # recurrent layers are one operation that is not counted
        if isinstance(part, nn.LSTM | nn.GRU):
            total += 2 * sum(p.numel() for p in part.parameters())
    return total + 2 * asked.predicted * asked.vocabulary * model.dim


def _state_bytes(counts: Counts, layout: Layout) -> tuple[float, float]:
    """Weights with gradients, and optimizer state, on one device."""
    parts, copies = layout.tensor * layout.pipeline, layout.copies
    dense = (counts.parameters - counts.expert_parameters) / parts
    experts = counts.expert_parameters / parts
    here = dense + experts / (layout.experts or copies)
    sharded = (dense + experts) / copies
    weights = sharded if layout.sharding == "full" else here
    optimizer = here if layout.sharding == "none" else sharded
    each = COPY_BYTES + MOMENT_BYTES * counts.moments / counts.parameters
    return (WEIGHT_BYTES + GRADIENT_BYTES) * weights, each * optimizer


def _activation_bytes(counts: Counts, layout: Layout) -> float:
    """What the layers of the first pipeline stage keep for the backward pass.

    It holds `pipeline` micro-batches of layers / pipeline layers: as much as all layers of one.
    """
    asked = counts.asked
    positions = layout.micro_batch * asked.row_length
    # 19 of the 34 bytes are the feed-forward layer's, for an inner width of 4 * dim
    whole = LAYER_BYTES + 19 * (counts.inner / (4 * counts.dim) - 1)
    each = CHECKPOINT_BYTES if layout.checkpointing else whole
    kept = counts.layers * positions * counts.dim * each
    working = positions * counts.dim * whole if layout.checkpointing else 0.0
    logits = 6 * positions * asked.predicted * asked.vocabulary  # in 16 bits and in float32
    return (kept + working + logits) / layout.tensor


def smallest_that_fits(counts: Counts, layout: Layout, device: Hardware) -> Layout | None:
    """The same devices with as little tensor and pipeline parallelism as memory allows.

    Layers compute their activations again; then copies share their state, then up to eight devices
    share every matrix, then the layers are spread. None: nothing helps.
    """
    whole = range(1, layout.devices + 1)
    for pipeline in (p for p in whole if layout.devices % p == 0 and p <= counts.layers):
        for tensor in (t for t in (1, 2, 4, 8) if layout.devices % (t * pipeline) == 0):
            for sharding in ("none", "optimizer", "full"):
                parallel = {"tensor": tensor, "pipeline": pipeline, "experts": 0}
                tried = replace(layout, **parallel, sharding=sharding, checkpointing=True)
                if plan(counts, tried, device).fits:
                    return tried
    return None


def as_mapping(found: Plan) -> dict[str, Any]:
    """Plain values, for JSON."""
    return {**asdict(found), "bytes_per_device": found.bytes_per_device, "fits": found.fits}
