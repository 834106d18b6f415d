"""One training on many ranks: who computes what, and how weights and gradients are spread.

The batch of a step is that of the configuration, whatever the number of ranks. Ranks divide its
forward passes among themselves (`accumulate`), where that is possible: then masks, dropout and so
the numbers are those of one process. Otherwise they divide the rows of each pass.

Every rank holds all weights, and gradients are averaged while they are computed (DDP), unless the
weights are spread over the ranks: see `sharding.py`. Checkpoints hold whole tensors under the names
of one process, so any number of ranks goes on from those of any other.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple, TypeVar, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from selfsup import console, ranks
from selfsup.batch import Batch
from selfsup.errors import ConfigError
from selfsup.models.block import Block
from selfsup.objective import Objective
from selfsup.training.checkpoint import Checkpoint
from selfsup.training.config import TrainingConfig
from selfsup.training.optim import clip_gradient

T = TypeVar("T")
PARTS = ("weights", "optimizer", "best")  # of a checkpoint
WAIT = timedelta(hours=24)  # rank 0 may prepare a corpus meanwhile; torchrun watches for the dead


@contextmanager
def processes() -> Iterator[None]:
    """Joins the processes that torchrun has started; those but the first keep silent.

    Raises:
        ConfigError: torch sees fewer GPUs than there are processes on this machine.
    """
    if not ranks.launched() or dist.is_initialized():
        yield
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"process {local} of this machine has no GPU of its own, torch sees "
                f"{torch.cuda.device_count()}; start torchrun with so many --nproc-per-node"
            )
        torch.cuda.set_device(local)
    dist.init_process_group(timeout=WAIT)
    try:
        if ranks.first():
            console.say(f"{ranks.count()} ranks")
            yield
        else:
            with console.silent():
                yield
    finally:
        ranks.set_group(None)
        dist.destroy_process_group()


@contextmanager
def machines_turn() -> Iterator[None]:
    """The first process of each machine goes through the block before its others do.

    For what is prepared once and then found: a store of tokenized text.
    """
    if not dist.is_initialized():
        yield
        return
    leads = os.environ.get("LOCAL_RANK", "0") == "0"
    if not leads:
        dist.barrier()
    yield
    if leads:
        dist.barrier()


class Share(NamedTuple):
    """What one rank computes of a step."""

    passes: tuple[int, ...]  # numbers of the forward passes
    rows: slice  # of each pass
    seeds: tuple[int, ...]  # what tells this rank's random numbers from another's


def share_of(objective: nn.Module, config: TrainingConfig, rank: int, count: int) -> Share:
    """Divides a step among ranks.

    Raises:
        ConfigError: neither the passes nor the rows of a pass divide evenly.

    >>> config = TrainingConfig(steps=1, batch_size=8, accumulate=4)
    >>> share_of(nn.Identity(), config, 1, 2)
    Share(passes=(1, 3), rows=slice(0, 8, None), seeds=())
    >>> share_of(nn.Identity(), config, 1, 8)
    Share(passes=(0, 1, 2, 3), rows=slice(1, 2, None), seeds=(1,))
    """
    size, passes = config.batch_size, range(config.accumulate)
    whole = any(getattr(module, "whole_batch", False) for module in objective.modules())
    if config.accumulate % count == 0 and (count == 1 or not whole):
        return Share(tuple(passes[rank::count]), slice(0, size), ())
    if size % count:
        raise ConfigError(
            f"{count} ranks cannot divide training.batch_size = {size} evenly; set "
            f"training.batch_size={size // count * count or count}"
        )
    part = size // count
    return Share(tuple(passes), slice(rank * part, (rank + 1) * part), (rank,))


def check_ranks(config: TrainingConfig) -> None:
    """Refuses what the number of ranks cannot divide, whatever is learned: before data are read.

    Raises:
        ConfigError: the ranks, or the batch.
    """
    world = ranks.world()
    if world % config.tensor_parallel:
        raise ConfigError(
            f"training.tensor_parallel = {config.tensor_parallel} does not divide {world} rank(s); "
            "start so many with torchrun"
        )
    share_of(nn.Identity(), config, 0, world // config.tensor_parallel)


class Root(nn.Module):
    """Runs work that computes with an objective, so that what wraps this module sees it begin."""

    def __init__(self, objective: Objective):
        super().__init__()
        self.objective = objective

    def forward(self, work: Callable[[], T]) -> T:
        """Does the work."""
        return work()


@final
class Spread:
    """An objective as the ranks hold it.

    Args:
        objective: the same on every rank.
        config: batch, sharding, recomputing.
        device: of this rank.

    Attributes:
        objective: what trains: the given one, or where it is sharded a copy of it, whose weights
            come back with `finish`.
        share: of each step, for this rank.

    Raises:
        ConfigError: ranks, batch, heads or widths do not divide evenly.
    """

    def __init__(self, objective: Objective, config: TrainingConfig, device: torch.device):
        self.given, self.objective, self.device = objective, objective, device
        self.world = ranks.world()
        self.tensor_ranks = config.tensor_parallel
        check_ranks(config)
        self.root: Any = None
        self.shards: Any = None
        if config.recompute:
            recompute(objective)
        if self.world > 1 and (config.sharded or self.tensor_ranks > 1):
            from selfsup.training.sharding import Shards  # takes a second to import

            self.shards = Shards(objective, self.tensor_ranks, device)
            self.objective, self.root = self.shards.objective, self.shards.root
        self.objective.to(device)
        self.share = share_of(self.objective, config, ranks.number(), ranks.count())
        if self.world > 1 and self.shards is None:
            # of 1 x 1 convolutions, whose strides say nothing
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view", UserWarning)
            with warnings.catch_warnings():  # the new name of `broadcast_buffers` is very new
                warnings.simplefilter("ignore", FutureWarning)
                # what a batch leaves unused (a head, a segment's vector) must not be waited for
                self.root = nn.parallel.DistributedDataParallel(
                    Root(objective), broadcast_buffers=False, find_unused_parameters=True
                )

    def compute(self, work: Callable[[], T], last: bool) -> T:
        """A forward pass with gradient; gradients are exchanged after the `last` one of a step."""
        if self.root is None:
            return work()
        if self.shards is None:
            self.root.require_backward_grad_sync = last
        else:
            self.shards.exchange(last)
        return self.root(work)

    def look(self, work: Callable[[], T]) -> T:
        """Work without gradient that all ranks do alike."""
        with ranks.alone():
            return work() if self.shards is None else self.shards.look(work)

    def refresh(self, batches: Iterable[Batch], generator: torch.Generator) -> None:
        """`Objective.refresh`, which all ranks do alike."""
        with ranks.alone():
            if self.shards is None:
                self.objective.refresh(batches, generator)
            else:
                self.shards.refresh(self.given.to(self.device), batches, generator)

    def sums(self, *values: float) -> list[float]:
        """Sums over ranks; those that compute one batch together count once."""
        if self.world == 1:
            return list(values)
        packed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(packed)
        return (packed / self.tensor_ranks).tolist()

    def average(self, weight: float) -> None:
        """Turns gradients, summed over passes and averaged over ranks, into means of `weight`."""
        divisor = max(weight, 1.0) / ranks.count()
        for parameter in self.objective.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(divisor)

    def clip(self, limit: float) -> Tensor:
        """`clip_gradient` of the whole gradient."""
        return (
            clip_gradient(self.objective, limit) if self.shards is None else self.shards.clip(limit)
        )

    def whole(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights or moments by name as one process holds them; every rank has to ask."""
        return tensors if self.shards is None else self.shards.whole(tensors)

    def restored(self, found: Checkpoint | None) -> Checkpoint | None:
        """The checkpoint that the first process has read, as this rank holds it.

        The first process sends it, so the others need not see its folder.
        """
        if self.world == 1:
            return found
        said: list[Any] = [None]
        if found is not None:
            shapes: dict[str, Any] = {part: _shapes(getattr(found, part)) for part in PARTS}
            said = [found._replace(**shapes)]
        dist.broadcast_object_list(said, src=0)
        if said[0] is None:
            return None
        sent = {
            part: None
            if (of_part := getattr(said[0], part)) is None
            else {
                name: self._sent(name, found and getattr(found, part)[name], shape)
                for name, shape in of_part.items()
            }
            for part in PARTS
        }
        return said[0]._replace(**sent)

    def _sent(self, name: str, source: Tensor | None, shape: Tensor) -> Tensor:
        """One tensor of the first process, as this rank holds it."""
        tensor = torch.empty_like(shape, device=self.device)
        if source is not None:
            tensor.copy_(source)
        dist.broadcast(tensor, src=0)
        return tensor if self.shards is None else self.shards.placed(name, tensor)

    def finish(self) -> None:
        """The trained weights, in the objective that was given."""
        if self.shards is not None:
            whole = self.shards.whole(self.objective.state_dict())
            if ranks.first():
                self.given.load_state_dict(whole)
            self.given.to(self.device)


def _shapes(tensors: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Tensors without content."""
    return tensors and {name: tensor.to("meta") for name, tensor in tensors.items()}


def recompute(objective: Objective) -> None:
    """Blocks keep only what they read and compute themselves again in the backward pass."""
    for module in objective.modules():
        if isinstance(module, Block):
            forward = partial(recomputed, module.forward, use_reentrant=False)
            module.forward = forward  # type: ignore[method-assign]
