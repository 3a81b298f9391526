"""MoCo v2."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from ssl_lightning import ema, losses
from ssl_lightning.distributed import gather, own_part, world_size
from ssl_lightning.errors import UserError
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.optim import Optim
from ssl_lightning.queue import Queue


class MoCoV2(SSLModule):
    """MoCo v2: a query finds its key among a long queue of earlier keys.

    Chen et al. 2020, Improved Baselines with Momentum Contrastive Learning, https://arxiv.org/abs/2003.04297; He et al.
    2020, Momentum Contrast, https://arxiv.org/abs/1911.05722. The paper's query encoder is ``backbone`` and
    ``projector``, its key encoder their teachers. BatchNorm is per process, and the images of the keys are shuffled
    among processes, so that a key's BatchNorm statistics do not give its image away. Views of 32 px are those of the
    authors' notebook but for bicubic interpolation (there bilinear) and the deviation of pixels (there 0.20).

    Args:
        temperature: Divides the cosine similarities.
        momentum: Share of the teacher that stays at each step.
        queue_length: Number of keys K that serve as negatives; a multiple of the global batch.
        projector_dim: Width of queries and keys.
        bn_splits: Number of groups of images with separate BatchNorm statistics: on a single device it replaces the
            shuffling among processes (8 in the authors' CIFAR-10 notebook). 1 leaves BatchNorm as it is.
        optim: Optimizer and learning-rate schedule.
        kwargs: See SSLModule.
    """

    views = "moco_v2"
    drops_tokens = True
    remedies = "a temperature near 0.2, a momentum of 0.99 to 0.999, a queue no longer than the data set"
    global_views = 2
    batch_norm = "per_process"
    zero_init_residual = False

    def __init__(
        self,
        temperature: float = 0.2,
        momentum: float = 0.999,
        queue_length: int = 65536,
        projector_dim: int = 128,
        bn_splits: int = 1,
        optim: Optim = Optim(
            "sgd", base_lr=0.03, weight_decay=1e-4, decay_norm_and_bias=True, warmup_epochs=0, per_epoch=True
        ),
        **kwargs: Any,
    ) -> None:
        super().__init__(optim=optim, **kwargs)
        self.temperature, self.momentum, self.bn_splits = temperature, momentum, bn_splits
        if bn_splits > 1:
            _split_batch_norm(self.backbone, bn_splits)
        self.projector = nn.Sequential(
            nn.Linear(self.embed_dim, self.embed_dim), nn.ReLU(inplace=True), nn.Linear(self.embed_dim, projector_dim)
        )
        self.teacher_backbone = ema.teacher_of(self.backbone)
        self.teacher_projector = ema.teacher_of(self.projector)
        self.queue = Queue(F.normalize(torch.randn(queue_length, projector_dim), dim=1))

    def training_loss(self, views: Sequence[Tensor]) -> Tensor:
        """InfoNCE of the first view's queries with the second view's keys (algorithm 1)."""
        queries = self.projector(self.backbone(views[0]))  # (B, projector_dim)
        all_keys = self._keys(views[1])  # (N, projector_dim) of all processes
        self.defer(keys=all_keys)
        return losses.info_nce(queries, own_part(all_keys), self.queue.rows, self.temperature)

    @torch.no_grad()
    def _keys(self, images: Tensor) -> Tensor:
        """Keys of all processes in order; each process computes a random part, unless a BatchNorm sees them all."""
        shuffle = world_size() > 1 or self.bn_splits > 1
        if shuffle:
            images = gather(images)  # (N, 3, S, S)
            order = self.random_to_device(torch.randperm(len(images), generator=self.generator))
            images = images[own_part(order)]
        keys = self.teacher_projector(self.teacher_backbone(images))
        keys = gather(F.normalize(keys.to(self.queue.rows.dtype), dim=1))
        return keys[order.argsort()] if shuffle else keys

    def teacher_momentum(self, progress: float) -> float:
        """Constant."""
        return self.momentum

    def update_teacher(self) -> None:
        """Move the key encoder, and let the keys of the step enter the queue.

        The released code moves it at the start of the next step, which is the same.
        """
        ema.follow_all(self, self.momentum)
        for keys in self.deferred("keys"):
            self.queue.push(keys)

    def check(self, sizes: list[int], global_batch: int) -> None:
        """The queue must hold a whole number of global batches, the batch a whole number of splits."""
        super().check(sizes, global_batch)
        self.queue.check(global_batch)
        batch = global_batch // self.trainer.world_size
        if batch % self.bn_splits:
            raise UserError(
                f"--model.bn_splits={self.bn_splits} does not divide the batch; --data.batch_size is {batch}."
            )
        if self.trainer.world_size == 1 and self.bn_splits == 1 and _has_batch_norm(self.backbone):
            rank_zero_warn(
                "on a single device MoCo v2's BatchNorm gives away which key belongs to a query: the loss falls, but "
                "features do not improve. Set --model.bn_splits to 8 to split the batch as several devices would."
            )

    def health(self, views: Sequence[Tensor]) -> dict[str, Tensor | float]:
        """Steps since the oldest key of the queue entered it."""
        return {"queue_age": len(self.queue.rows) / (len(views[0]) * world_size())}

    @property
    def chance_loss(self) -> float:
        """ln(K + 1): every candidate is as likely as the key."""
        return math.log(len(self.queue.rows) + 1)


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that, in training, takes the statistics of ``splits`` groups of images separately.

    The stand-in for several devices of the authors' CIFAR-10 notebook (facebookresearch/moco, branch colab-notebook).
    """

    splits: int

    def forward(self, images: Tensor) -> Tensor:
        """Normalize ``(B, C, H, W)``; B is a multiple of ``splits``."""
        if not self.training:
            return super().forward(images)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        mean, variance = self.running_mean.repeat(self.splits), self.running_var.repeat(self.splits)
        grouped = images.reshape(
            -1, self.splits * self.num_features, *images.shape[2:]
        )  # (B / splits, splits * C, ...)
        weight, bias = self.weight.repeat(self.splits), self.bias.repeat(self.splits)
        out = F.batch_norm(grouped, mean, variance, weight, bias, True, self.momentum, self.eps)
        self.running_mean.copy_(mean.view(self.splits, -1).mean(0))
        self.running_var.copy_(variance.view(self.splits, -1).mean(0))
        return out.view_as(images)


def _split_batch_norm(backbone: nn.Module, splits: int) -> None:
    plain: list[Any] = [module for module in backbone.modules() if type(module) is nn.BatchNorm2d]
    if _has_batch_norm(backbone) and not plain:
        raise UserError("--model.bn_splits supports only nn.BatchNorm2d, and this backbone has none; leave it at 1.")
    for module in plain:
        module.__class__ = SplitBatchNorm2d
        module.splits = splits


def _has_batch_norm(backbone: nn.Module) -> bool:
    return any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
