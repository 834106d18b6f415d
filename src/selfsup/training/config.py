"""What decides how long, how fast and how safely a run trains."""

from dataclasses import dataclass
from typing import Literal

Optimizer = Literal["adamw", "adafactor", "lamb", "lars"]
Schedule = Literal["linear", "cosine", "wsd", "constant"]
LEAST = {
    **dict.fromkeys(("batch_size", "accumulate", "log_every", "valid_batches"), 1),
    **dict.fromkeys(("checkpoint_every", "checkpoints", "tensor_parallel"), 1),
    **dict.fromkeys(
        ("keep_every", "evaluations", "patience", "lr", "eps", "weight_decay", "clip"), 0
    ),
}
"""The smallest value that a key may have."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long, how fast and how safely to train.

    Exactly one of `steps`, `tokens` and `minutes` is the budget. With `minutes` the learning rate
    follows the clock, so the run ends when it was promised to; only budgets in steps or tokens are
    bit-equal from run to run.
    """

    steps: int | None = None
    """Budget in optimizer steps."""
    tokens: int | None = None
    """Budget in real (unpadded) tokens, or in examples where the data has no tokens."""
    minutes: float | None = None
    """Budget in minutes of wall clock."""
    batch_size: int = 32
    """Examples per forward pass, of all ranks together."""
    accumulate: int = 1
    """Forward passes per optimizer step, of all ranks together; weighted by item counts."""
    lr: float = 1e-3
    """Peak learning rate."""
    optimizer: Optimizer = "adamw"
    """adamw, adafactor (little memory), lamb or lars (large batches)."""
    weight_decay: float = 0.01
    """Decay of matrices: decoupled in AdamW and Adafactor, inside the step in LAMB and LARS."""
    betas: tuple[float, ...] = (0.9, 0.98)
    """Decays of AdamW's and LAMB's two moments; the first is LARS' momentum."""
    eps: float = 1e-6
    """AdamW's and LAMB's epsilon."""
    relative_step: bool = True
    """Adafactor's rate is a share of each parameter's own size; false: it is one as AdamW's."""
    clip: float = 1.0
    """Largest L2 norm of the gradient; 0 switches clipping off."""
    warmup: float = 0.06
    """Share of the budget in which the learning rate rises."""
    schedule: Schedule = "linear"
    """How the learning rate falls: linear, cosine, wsd or constant."""
    decay: float = 0.2
    """Share of the budget in which `wsd` falls."""
    final_lr: float = 0.0
    """Share of the peak learning rate at the end."""
    evaluations: int = 10
    """How often the held-out part is looked at, evenly over the budget."""
    valid_batches: int = 16
    """Held-out batches per evaluation."""
    patience: int = 0
    """Stop after so many evaluations without improvement; 0: never."""
    keep: Literal["last", "best"] = "last"
    """Which weights the model folder gets: the last, or those with the best validation loss."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    keep_every: int = 0
    """Checkpoints of every so many steps stay for good, a multiple of checkpoint_every; 0: none."""
    async_save: bool = True
    """Checkpoints are written while training goes on, from a copy of weights and moments."""
    log_every: int = 10
    """Steps per row of metrics.jsonl."""
    seed: int = 0
    """Decides initial weights, order, masks and dropout."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 autocast where the processor computes in it, float32 elsewhere."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    compile: bool = False
    """torch.compile of the objective's loss; pays on GPUs."""
    sharded: bool = False
    """Ranks share out weights, gradients and moments (FSDP2), for models too large for one GPU."""
    tensor_parallel: int = 1
    """So many ranks compute each block of a transformer together; 1: each computes alone."""
    recompute: bool = False
    """Blocks keep only what they read, and are computed again in the backward pass."""
    nonfinite: Literal["skip", "stop"] = "stop"
    """What to do with a step whose loss or gradient is not finite; weights never see it."""
    tensorboard: bool = False
    """Also write TensorBoard files (needs the tensorboard extra)."""

    def __post_init__(self) -> None:
        budgets = [b for b in (self.steps, self.tokens, self.minutes) if b is not None]
        if len(budgets) != 1 or not budgets[0] > 0:
            raise ValueError("give exactly one positive budget: steps, tokens or minutes")
        for name, least in LEAST.items():
            if not getattr(self, name) >= least:  # so written, NaN is refused too
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas needs two numbers from 0 up to 1, got {list(self.betas)}")
        if not 0 <= self.warmup < 1:
            raise ValueError("warmup is a share of the budget, from 0 up to 1")
        for name in ("decay", "final_lr"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share, from 0 to 1, got {getattr(self, name)}")
        if self.keep_every % self.checkpoint_every:
            raise ValueError(
                f"keep_every must be a multiple of checkpoint_every ({self.checkpoint_every}), got "
                f"{self.keep_every}"
            )
        if not self.relative_step and self.optimizer != "adafactor":
            raise ValueError(f"relative_step is adafactor's; optimizer is {self.optimizer}")
        if self.optimizer != "adamw" and (self.sharded or self.tensor_parallel > 1):
            raise ValueError(
                f"optimizer = {self.optimizer!r} needs whole weights on each rank: use 'adamw' "
                "with sharded and tensor_parallel"
            )
        if self.evaluations == 0 and (self.keep == "best" or self.patience):
            raise ValueError("keep = 'best' and patience look at evaluations, of which there are 0")
