"""Teachers: copies of a student that follow it as an exponential moving average."""

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from ssl_lightning.distributed import reduced, shards, world_size
from ssl_lightning.errors import UserError

Part = TypeVar("Part", bound=nn.Module)


def teacher_of(student: Part) -> Part:
    """A copy without gradient, dropout or drop path; it stays in train mode, so its BatchNorm uses the batch.

    Args:
        student: Backbone or head to copy.
    """
    try:
        teacher = copy.deepcopy(student).requires_grad_(False)
    except RuntimeError as error:  # a network of one's own may hold what torch does not copy
        raise UserError(f"the teacher is a copy of the backbone, but torch cannot copy it: {error}") from error
    for module in teacher.modules():
        drops = isinstance(module, nn.modules.dropout._DropoutNd) or type(module).__name__ == "StochasticDepth"
        rate = "p" if drops else "drop_prob"  # the latter of timm's stochastic depth
        if isinstance(getattr(module, rate, None), float):
            setattr(module, rate, 0.0)
    return teacher


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move the parameters of a teacher: momentum * teacher + (1 - momentum) * student, in one call for all tensors.

    Buffers do not move: a teacher's BatchNorm keeps the statistics of its own batches.

    Args:
        teacher: Module to move.
        student: Module of the same parameters.
        momentum: Share of the teacher that stays.
    """
    weights = shards(teacher.parameters())
    torch._foreach_lerp_(weights, shards(student.parameters()), 1 - momentum)


def follow_all(method: nn.Module, momentum: float) -> None:
    """Move every part ``teacher_<name>`` of a method towards its part ``<name>``.

    Args:
        method: Has students and teachers as children.
        momentum: Share of the teachers that stays.
    """
    for name, teacher in method.named_children():
        if name.startswith("teacher_"):
            follow(teacher, method.get_submodule(name.removeprefix("teacher_")), momentum)


def evaluate_teachers(method: nn.Module) -> None:
    """Set the teachers to eval mode, but for BatchNorm: it uses the batch in training, as ``follow`` moves no buffers.

    Args:
        method: Has teachers as children ``teacher_<name>``.
    """
    for name, teacher in method.named_children():
        if name.startswith("teacher_"):
            for part in teacher.modules():
                part.training = method.training and isinstance(part, nn.modules.batchnorm._BatchNorm)


@torch.no_grad()
def follow_mean(center: Tensor, means: Sequence[Tensor], momentum: float) -> None:
    """Move a center towards the mean over all processes and accumulated batches.

    Args:
        center: ``(K,)``; moved in place.
        means: ``(K,)`` for each batch of this process; an empty sequence leaves the center unchanged.
        momentum: Share of the center that stays.
    """
    if means:
        center.lerp_(reduced(torch.stack(list(means)).mean(0)) / world_size(), 1 - momentum)
