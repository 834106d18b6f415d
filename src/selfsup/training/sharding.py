"""Weights that are spread over ranks: sharded data parallelism and tensor parallelism.

Each rank holds its share of weights, gradients and moments and borrows a block's weights while it
computes that block (FSDP2; Zhao et al. 2023, arXiv 2304.11277). With tensor parallelism several
ranks compute each block together, every one some heads and some of the inner features: the first
linear layer of a pair is divided by rows, the second by columns, and one sum over the ranks follows
each pair (Shoeybi et al. 2019, arXiv 1909.08053, section 3). Embeddings, norms and the head on the
vocabulary are not divided among tensor-parallel ranks.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from selfsup import ranks
from selfsup.batch import Batch
from selfsup.errors import ConfigError
from selfsup.models.block import Block, DecoderBlock
from selfsup.objective import Objective
from selfsup.training.distributed import Root

T = TypeVar("T")


@final
class Shards:
    """A copy of an objective whose weights are spread over all ranks.

    Args:
        objective: the same on every rank; it stays as it is.
        tensor_ranks: how many ranks compute each block together; it divides their number.
        device: of this rank.

    Attributes:
        objective: the copy.
        root: what a forward pass goes through.
        fused: how many matrices lie on top of each other in a weight whose rows are divided among
            tensor-parallel ranks, by its name.

    Raises:
        ConfigError: a method that cannot be sharded; heads do not divide evenly, or there are
            experts or no blocks to divide.
    """

    def __init__(self, objective: Objective, tensor_ranks: int, device: torch.device):
        _check(objective)
        self.tensor_ranks, self.device = tensor_ranks, device
        self.fused: dict[str, int] = {}
        shape = (dist.get_world_size() // tensor_ranks, tensor_ranks)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "tensor"))
        ranks.set_group(mesh["data"].get_group())
        self.objective = copy.deepcopy(objective)
        scales = {n: getattr(p, "lr_scale", None) for n, p in objective.named_parameters()}
        self.root: Any = Root(self.objective)
        blocks = {n: m for n, m in self.objective.named_modules() if isinstance(m, Block)}
        if tensor_ranks > 1:
            if not blocks:
                raise ConfigError("training.tensor_parallel divides transformers; this is none")
            for name, block in blocks.items():
                self._divide(name, block, mesh["tensor"])
        if ranks.count() > 1:
            for block in blocks.values():
                fully_shard(block, mesh=mesh["data"])
            fully_shard(self.root, mesh=mesh["data"])
        for name, parameter in self.objective.named_parameters():
            if scales[name] is not None:
                parameter.lr_scale = scales[name]  # type: ignore[attr-defined]

    def _divide(self, name: str, block: Block, mesh: DeviceMesh) -> None:
        """Heads and inner features of one block; its norms stay whole."""
        heads = block.attention.heads
        if block.routed or heads % self.tensor_ranks or block.attention.kept is not None:
            what = "experts" if block.routed else f"{heads} heads"
            raise ConfigError(
                f"training.tensor_parallel = {self.tensor_ranks} cannot divide {what} of {name}"
            )
        first = {"attention.qkv": 3, "feedforward.up": 2 if block.feedforward.gated else 1}
        second = ["attention.out", "feedforward.down"]
        attentions: list[Any] = [block.attention]
        if isinstance(block, DecoderBlock):
            first |= {"cross.query": 1, "cross.kv": 2}
            second.append("cross.out")
            attentions.append(block.cross)
        for part, fused in first.items():
            for key, parameter in block.get_submodule(part).named_parameters():
                self.fused[f"{name}.{part}.{key}"] = fused
                parameter.data = self._by_rank(parameter.data, fused)
        plan: dict[str, Any] = {part: ColwiseParallel() for part in first}
        parallelize_module(block, mesh, plan | {part: RowwiseParallel() for part in second})
        for attention in attentions:
            attention.heads //= self.tensor_ranks

    def _by_rank(self, rows: Tensor, fused: int) -> Tensor:
        """Rows in the order (matrix, rank, row) in the order (rank, matrix, row): one rank's lie
        together."""
        return rows.unflatten(0, (fused, self.tensor_ranks, -1)).transpose(0, 1).flatten(0, 2)

    def _by_matrix(self, rows: Tensor, fused: int) -> Tensor:
        """The way back."""
        return rows.unflatten(0, (self.tensor_ranks, fused, -1)).transpose(0, 1).flatten(0, 2)

    def exchange(self, now: bool) -> None:
        """Whether the next backward pass sends its gradients to the others."""
        if ranks.count() > 1:
            self.root.set_requires_gradient_sync(now)

    def look(self, work: Callable[[], T]) -> T:
        """Work without gradient that all ranks do alike."""
        found = self.root(work)
        if hasattr(self.root, "reshard"):
            self.root.reshard()
        return found

    @torch.no_grad()
    def refresh(
        self, given: Objective, batches: Iterable[Batch], generator: torch.Generator
    ) -> None:
        """`Objective.refresh` of all weights, which every rank borrows for the time.

        Args:
            given: the objective as one process holds it; what it says is overwritten.
            batches: of all data, the same on every rank.
            generator: in the same state on every rank.
        """
        given.load_state_dict(
            {n: self._whole(n, x) for n, x in self.objective.state_dict().items()}
        )
        given.train(self.objective.training)
        given.refresh(batches, generator)
        for name, parameter in given.named_parameters():
            _here(self.objective.get_parameter(name)).copy_(_here(self.placed(name, parameter)))
        for name, buffer in given.named_buffers():
            owner, _, key = name.rpartition(".")
            setattr(self.objective.get_submodule(owner), key, buffer.clone())

    def clip(self, limit: float) -> Tensor:
        """As `clip_gradient`: the norm is that of all ranks' shares."""
        gradients = [p.grad for p in self.objective.parameters() if p.grad is not None]
        by_groups: dict[tuple, list[Tensor]] = {}
        for gradient in gradients:
            by_groups.setdefault(_holders(gradient), []).append(_here(gradient))
        square = torch.zeros((), device=self.device)
        for groups, parts in by_groups.items():
            part = torch.nn.utils.get_total_norm(parts).square()
            for group in groups:
                dist.all_reduce(part, group=group)
            square += part
        norm = square.sqrt()
        if limit > 0:
            scale = (limit / (norm + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                _here(gradient).mul_(scale)
        return norm

    def whole(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by name as one process holds them, on the first rank; empty on the others."""
        out = {}
        for name, tensor in tensors.items():
            tensor = self._whole(name, tensor)
            if ranks.first():
                out[name] = tensor.cpu()
        return out

    def _whole(self, name: str, tensor: Tensor) -> Tensor:
        """A weight or moment as one process holds it; every rank has to ask."""
        if not isinstance(tensor, DTensor):
            return tensor
        fused = self.fused.get(_weight_of(name))
        return (
            tensor.full_tensor() if fused is None else self._by_matrix(tensor.full_tensor(), fused)
        )

    def placed(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's share of a whole weight or moment."""
        own = self.objective.get_parameter(_weight_of(name)) if self._has(name) else None
        if not isinstance(own, DTensor) or own.shape != tensor.shape:
            return tensor
        fused = self.fused.get(_weight_of(name))
        tensor = tensor if fused is None else self._by_rank(tensor, fused)
        return distribute_tensor(tensor, own.device_mesh, own.placements, src_data_rank=None)

    def _has(self, name: str) -> bool:
        return _weight_of(name) in dict(self.objective.named_parameters())


def _check(objective: Objective) -> None:
    name = type(objective).__name__
    for parameter, weight in objective.named_parameters():
        if weight.ndim == 0:
            raise ConfigError(
                f"training.sharded: {parameter} of {name} is a single number; leave it out"
            )


def _here(x: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def _holders(x: Tensor) -> tuple[Any, ...]:
    """The groups of ranks that hold different parts of a tensor."""
    if not isinstance(x, DTensor):
        return ()
    placed = enumerate(x.placements)
    return tuple(x.device_mesh.get_group(i) for i, place in placed if not place.is_replicate())


def _weight_of(name: str) -> str:
    """The weight whose moment is called so: `encoder.x.weight|exp_avg`."""
    return name.rpartition("|")[0] or name
