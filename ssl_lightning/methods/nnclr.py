"""NNCLR."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lightning import losses
from ssl_lightning.distributed import gather, world_size
from ssl_lightning.heads import mlp
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.optim import Optim
from ssl_lightning.queue import Queue


class NNCLR(SSLModule):
    """NNCLR: the nearest neighbor of a view among earlier images finds the other view in the batch.

    Dwibedi et al. 2021, With a Little Help from My Friends: Nearest-Neighbor Contrastive Learning of Visual
    Representations, https://arxiv.org/abs/2104.14548. The paper's support set is the ``queue``: projections of the
    first views of earlier batches. BatchNorm is global. There is no released code; views, learning rate and weight
    decay are SimCLR's.

    Args:
        temperature: Divides the cosine similarities.
        queue_length: Number of projections K among which neighbors are searched; a multiple of the global batch.
        hidden_dim: Width of the projector's hidden layers.
        projector_dim: Width of projections and predictions.
        predictor_dim: Width of the predictor's hidden layer.
        optim: Optimizer and learning-rate schedule.
        kwargs: See SSLModule.
    """

    views = "nnclr"
    drops_tokens = True
    remedies = "a temperature of 0.1 to 0.2, a queue no longer than the data set, a lower learning rate"
    global_views = 2
    batch_norm = "global"

    def __init__(
        self,
        temperature: float = 0.1,
        queue_length: int = 98304,
        hidden_dim: int = 2048,
        projector_dim: int = 256,
        predictor_dim: int = 4096,
        optim: Optim = Optim("lars", base_lr=0.3, weight_decay=1e-6),
        **kwargs: Any,
    ) -> None:
        super().__init__(optim=optim, **kwargs)
        self.temperature = temperature
        last_norm = nn.BatchNorm1d(projector_dim)
        self.projector = mlp([self.embed_dim, hidden_dim, hidden_dim, projector_dim], last_norm=last_norm)
        self.predictor = mlp([projector_dim, predictor_dim, projector_dim], last_bias=True)
        self.queue = Queue(F.normalize(torch.randn(queue_length, projector_dim), dim=1))

    def training_loss(self, views: Sequence[Tensor]) -> Tensor:
        """Each view's neighbor finds the prediction of the other view, mean of both directions (algorithm 1).

        Each view has its own forward pass and so its own BatchNorm statistics.
        """
        z1, z2 = (self.projector(self.backbone(view)) for view in views)  # (B, projector_dim)
        p1, p2 = self.predictor(z1), self.predictor(z2)  # (B, projector_dim)
        nn1, nn2 = (self.queue.rows[self._nearest(z)] for z in (z1, z2))  # (B, projector_dim)
        self.defer(projections=F.normalize(z1.detach().to(self.queue.rows.dtype), dim=1))
        return losses.nnclr(nn1, p2, self.temperature) / 2 + losses.nnclr(nn2, p1, self.temperature) / 2

    @torch.no_grad()
    def _nearest(self, projections: Tensor) -> Tensor:
        """Indices ``(B,)`` of the rows of the queue that are nearest to projections of any scale."""
        with torch.autocast(projections.device.type, enabled=False):
            return (projections.to(self.queue.rows.dtype) @ self.queue.rows.T).argmax(1)

    def update_teacher(self) -> None:
        """Let the projections of the step's first views enter the queue."""
        for projections in self.deferred("projections"):
            self.queue.push(gather(projections))

    def check(self, sizes: list[int], global_batch: int) -> None:
        """The queue must hold a whole number of global batches."""
        super().check(sizes, global_batch)
        self.queue.check(global_batch)

    def health(self, views: Sequence[Tensor]) -> dict[str, Tensor | float]:
        """Steps since the oldest row entered the queue, and the share of different neighbors in a batch."""
        nearest = self._nearest(self.projector(self.backbone(views[0])))
        age = len(self.queue.rows) / (len(nearest) * world_size())
        return {"queue_age": age, "neighbours_in_use": nearest.unique().numel() / len(nearest)}

    @property
    def chance_loss(self) -> float | None:
        """The entropy ln N: every prediction of the batch is as likely; known once a batch has been seen."""
        return None if self.global_batch is None else math.log(self.global_batch)
