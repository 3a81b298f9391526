"""Gathering across processes; every function is the identity when there is one process."""

import socket
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process among those that train together."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def free_port() -> int:
    """A free port of this machine, for processes to connect."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class _Gather(torch.autograd.Function):
    """All-gather whose backward sums the gradients of all processes: the only form that gives the exact gradient."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        ctx.rows = local.shape[0]
        parts = [torch.empty_like(local) for _ in range(world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # others may hold the same tensor
        dist.all_reduce(gradient)
        return gradient[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def gather(local: Tensor) -> Tensor:
    """Concatenate the rows of all processes in order of rank, with the exact gradient.

    If the loss averages over the local rows and gradients are averaged over processes, the gradient equals the gradient
    of a single process that holds the whole batch.

    Args:
        local: ``(B, ...)``, the same shape on every process.

    Returns:
        ``(W * B, ...)``.
    """
    return local if world_size() == 1 else _Gather.apply(local)


class _Sum(torch.autograd.Function):
    """All-reduce whose backward sums the gradients of all processes."""

    @staticmethod
    def forward(_ctx: Any, local: Tensor) -> Tensor:
        total = local.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient


def summed(local: Tensor) -> Tensor:
    """Sum over the processes, with the exact gradient, as for ``gather``.

    Args:
        local: The same shape on every process.
    """
    return local if world_size() == 1 else _Sum.apply(local)


def own_part(rows: Tensor) -> Tensor:
    """This process's part of the rows of all processes: the way back from ``gather``.

    Args:
        rows: ``(W * B, ...)``.
    """
    return rows.chunk(world_size())[rank()]


@torch.no_grad()
def reduced(local: Tensor, how: Literal["sum", "max"] = "sum") -> Tensor:
    """Sum or maximum of a tensor over the processes, without gradient.

    Args:
        local: The same shape on every process.
        how: ``sum`` or ``max``.
    """
    if world_size() == 1:
        return local
    total = local.clone()
    dist.all_reduce(total, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX)
    return total


@torch.no_grad()
def gather_uneven(local: Tensor) -> Tensor:
    """Concatenate rows of all processes in order of rank where their numbers differ; without gradient.

    Args:
        local: ``(B_r, ...)``, any number of rows per process.
    """
    if world_size() == 1:
        return local
    counts = [torch.zeros(1, dtype=torch.long, device=local.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([local.shape[0]], device=local.device))
    sizes = [int(count) for count in counts]
    padded = local.new_zeros((max(sizes), *local.shape[1:]))
    padded[: local.shape[0]] = local
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def gather_objects(local: list[Any]) -> list[Any]:
    """The items of all processes in order of rank, any number of each; they must be picklable.

    Args:
        local: The items of this process.
    """
    if world_size() == 1:
        return local
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, local)
    return [item for part in parts for item in part]


def shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This process's part of each sharded tensor, sharing its memory; other tensors as they are.

    Args:
        tensors: Parameters, gradients or states of an optimizer.
    """
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def sharded_like(shard: Any, whole: Any) -> Any:
    """A tensor, sharded like another if that is sharded and has the same shape; anything else as it is.

    Args:
        shard: A parameter or another tensor.
        whole: The whole of what it is to hold, the same on every process.
    """
    if not isinstance(shard, DTensor) or not isinstance(whole, Tensor) or whole.shape != shard.shape:
        return whole
    return distribute_tensor(whole.to(shard.device), shard.device_mesh, shard.placements)


@torch.no_grad()
def norms(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of each tensor, over all shards of a sharded tensor; all in a handful of calls.

    Args:
        tensors: All sharded in the same way, or all whole.
    """
    local = torch.stack(torch._foreach_norm(shards(tensors)))
    if not isinstance(tensors[0], DTensor):
        return local
    return reduced(local.square()).sqrt()
