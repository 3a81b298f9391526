"""Teachers: copies of a student that follow it as an exponential moving average."""

import copy

import torch
from torch import nn

from ssl_lightning.distributed import shards


def teacher_of(student: nn.Module) -> nn.Module:
    """A copy that gets no gradient and drops nothing; it stays in train mode, where BatchNorm sees the batch.

    Args:
        student: Backbone or head to copy.
    """
    teacher = copy.deepcopy(student).requires_grad_(False)
    for module in teacher.modules():
        for rate in ("drop_prob", "p"):  # stochastic depth of timm; of torchvision, and dropout
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
    return teacher


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move the parameters of a teacher: momentum * teacher + (1 - momentum) * student, in one call for all tensors.

    Buffers are left alone: a teacher's BatchNorm keeps the statistics of its own batches. The teacher remembers the
    momentum as ``last_momentum``, for who logs it.

    Args:
        teacher: Module to move.
        student: Module of the same parameters.
        momentum: Share of the teacher that stays.
    """
    weights = shards(teacher.parameters())
    torch._foreach_lerp_(weights, shards(student.parameters()), 1 - momentum)
    teacher.last_momentum = momentum  # type: ignore[assignment]
