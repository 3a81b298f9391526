"""SwAV."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lightning import losses
from ssl_lightning.backbones.tokens import multi_crop
from ssl_lightning.distributed import gather, own_part
from ssl_lightning.heads import mlp
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.optim import Optim
from ssl_lightning.queue import Queue


class SwAV(SSLModule):
    """SwAV: predict the cluster of a view from the other views, clusters being assigned evenly over the batch.

    Caron et al. 2020, Unsupervised Learning of Visual Features by Contrasting Cluster Assignments,
    https://arxiv.org/abs/2006.09882. The two global crops are assigned, all crops predict. BatchNorm is global.
    The defaults are for batches of 4096; smaller ones need a queue: ``queue_length=3840`` for 256 images.
    The queue holds the embeddings of all processes, and each process takes its share of it: the same assignments as
    the released code's queue per process, but whole in one checkpoint.

    Args:
        temperature: Divides the scores of the prediction.
        epsilon: Smoothness of the assignment (Sinkhorn-Knopp).
        sinkhorn_iterations: Iterations of the assignment.
        num_prototypes: Number of clusters K.
        hidden_dim: Width of the projector's hidden layer.
        projector_dim: Width of the embeddings.
        freeze_prototypes_steps: Optimizer steps at the start in which the prototypes are frozen.
        queue_length: Earlier embeddings of each global crop that are assigned together with the batch; a multiple of
            the global batch, 0 for none.
        queue_start_epoch: Epoch from which the queue is filled; it is used once full.
        optim: Optimizer and learning-rate schedule.
        kwargs: See SSLModule.
    """

    views = "swav"
    drops_tokens = True
    remedies = "an epsilon of 0.03 to 0.05, fewer prototypes, a queue for small batches, longer frozen prototypes"
    global_views = 2
    local_views = True
    batch_norm = "global"
    zero_init_residual = False
    shardable = False  # the prototypes are normalized in place

    def __init__(
        self,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        sinkhorn_iterations: int = 3,
        num_prototypes: int = 3000,
        hidden_dim: int = 2048,
        projector_dim: int = 128,
        freeze_prototypes_steps: int = 313,
        queue_length: int = 0,
        queue_start_epoch: int = 15,
        optim: Optim = Optim(
            "larc",
            base_lr=0.3,
            weight_decay=1e-6,
            decay_norm_and_bias=True,
            warmup_start_factor=0.0625,
            warmup_inclusive=True,
            end_lr_factor=0.001,
        ),
        **kwargs: Any,
    ) -> None:
        super().__init__(optim=optim, **kwargs)
        self.temperature, self.epsilon, self.sinkhorn_iterations = temperature, epsilon, sinkhorn_iterations
        self.freeze_prototypes_steps, self.queue_start_epoch = freeze_prototypes_steps, queue_start_epoch
        self.projector = mlp([self.embed_dim, hidden_dim, projector_dim], bias=True, last_bias=True)
        self.prototypes = nn.Linear(projector_dim, num_prototypes, bias=False)
        self.queue = Queue(torch.zeros(queue_length, 2, projector_dim)) if queue_length else None

    def training_loss(self, views: Sequence[Tensor]) -> Tensor:
        """Cross entropy between assignments of the global crops and predictions of all others (algorithm 1)."""
        with torch.no_grad():
            self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))
        embeddings = F.normalize(self.projector(multi_crop(self.backbone, views)), dim=1)  # (V * B, projector_dim)
        scores = self.prototypes(embeddings).unflatten(0, (len(views), -1))  # (V, B, K)
        assignments = torch.stack([self._assignments(scores, crop) for crop in range(2)])  # (2, B, K)
        if self.queue is not None and self.current_epoch >= self.queue_start_epoch:
            of_global_crops = embeddings.detach().unflatten(0, (len(views), -1))[:2]
            self.defer(embeddings=of_global_crops.transpose(0, 1))  # (B, 2, projector_dim)
        return losses.swav(scores, assignments, self.temperature)

    @torch.no_grad()
    def _assignments(self, scores: Tensor, crop: int) -> Tensor:
        """Assignment ``(B, K)`` of a global crop, even over the batch and, once it is full, the queue."""
        batch = scores[crop].detach()
        if self.queue is not None and self.queue.written >= len(self.queue.rows):
            earlier = own_part(self.queue.rows[:, crop])
            batch = torch.cat([self.prototypes(earlier), batch])
        return losses.sinkhorn(batch, self.epsilon, self.sinkhorn_iterations)[-scores.shape[1] :]

    def update_teacher(self) -> None:
        """Let the embeddings of the step enter the queue."""
        for embeddings in self.deferred("embeddings"):
            assert self.queue is not None
            self.queue.push(gather(embeddings))

    def edit_gradients(self) -> None:
        """Let frozen prototypes have no gradient, so that neither momentum nor decay moves them."""
        if self.global_step < self.freeze_prototypes_steps:
            self.prototypes.weight.grad = None

    def check(self, sizes: list[int], global_batch: int) -> None:
        """The queue must hold a whole number of global batches."""
        super().check(sizes, global_batch)
        if self.queue is not None:
            self.queue.check(global_batch)

    def health(self, views: Sequence[Tensor]) -> dict[str, Tensor | float]:
        """Entropy of the assignments, at most ln K, and the share of prototypes that are first of a view."""
        embeddings = F.normalize(self.projector(self.backbone(torch.cat(list(views[:2])))), dim=1)
        assignments = losses.sinkhorn(self.prototypes(embeddings).float(), self.epsilon, self.sinkhorn_iterations)
        return {"teacher_entropy": losses.entropy(assignments), "prototypes_in_use": losses.share_in_use(assignments)}

    @property
    def chance_loss(self) -> float:
        """The entropy ln K: every prototype is as likely."""
        return math.log(self.prototypes.out_features)
