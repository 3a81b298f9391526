"""ReSA."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssl_lightning import ema, losses
from ssl_lightning.distributed import gather
from ssl_lightning.heads import mlp
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.optim import Optim
from ssl_lightning.schedules import cosine


class ReSA(SSLModule):
    """ReSA: the batch clusters itself by the backbone's features, and embeddings are pulled together accordingly.

    Weng et al. 2025, Clustering Properties of Self-Supervised Learning, https://arxiv.org/abs/2501.18452. For ResNets
    and ViTs. The first view is weak: cropped and flipped only. Its features of student and teacher give the assignment
    that every pair of views follows. The teacher sees the first two views, the student all. The probes read the
    teacher. BatchNorm is global. The defaults are the ResNet-50 recipe of 100 epochs in batches of 256.

    Args:
        temperature: Divides the cosine similarities of embeddings.
        epsilon: Smoothness of the assignment (Sinkhorn-Knopp).
        sinkhorn_iterations: Iterations of the assignment.
        momentum: Share of the teacher that stays at the first step; it rises to 1 along a cosine.
        hidden_dim: Width of the projector's two hidden layers.
        projector_dim: Width of the embeddings.
        predictor_dim: Width of the hidden layer of the student's predictor; 0 for no predictor, as in the authors' code
            for CIFAR.
        optim: Optimizer and learning-rate schedule.
        kwargs: See SSLModule.
    """

    views = "resa"
    remedies = "a weak first view, an epsilon of 0.05, a temperature of 0.4, a lower learning rate"
    global_views = 2
    local_views = True
    batch_norm = "global"
    drops_tokens = True

    def __init__(
        self,
        temperature: float = 0.4,
        epsilon: float = 0.05,
        sinkhorn_iterations: int = 3,
        momentum: float = 0.996,
        hidden_dim: int = 2048,
        projector_dim: int = 512,
        predictor_dim: int = 2048,
        optim: Optim = Optim(
            "sgd",
            base_lr=0.5,
            weight_decay=1e-5,
            decay_norm_and_bias=True,
            warmup_epochs=2,
            warmup_inclusive=True,
            end_lr_factor=0.1,
        ),
        **kwargs: Any,
    ) -> None:
        super().__init__(optim=optim, **kwargs)
        self.temperature, self.epsilon, self.sinkhorn_iterations = temperature, epsilon, sinkhorn_iterations
        self.momentum = momentum
        widths, last_norm = [hidden_dim, hidden_dim, projector_dim], nn.BatchNorm1d(projector_dim, affine=False)
        self.projector = mlp([self.embed_dim, *widths], bias=True, last_bias=True, last_norm=last_norm)
        widths = [projector_dim, predictor_dim, projector_dim]
        self.predictor = mlp(widths, bias=True, last_bias=True) if predictor_dim else nn.Identity()
        self.teacher_backbone = ema.teacher_of(self.backbone)
        self.teacher_projector = ema.teacher_of(self.projector)

    def training_loss(self, views: Sequence[Tensor]) -> Tensor:
        """Cross entropy between the assignment and the similarities of each view to the teacher's others.

        Each view has its own forward pass and so its own BatchNorm statistics.
        """
        features = [self.backbone(view) for view in views]  # (B, embed_dim) each
        embeddings = torch.stack([self.predictor(self.projector(h)) for h in features])  # (V, B, E)
        with torch.no_grad():
            teacher_features = [self.teacher_backbone(view) for view in views[:2]]
            teacher = torch.stack([gather(self.teacher_projector(h)) for h in teacher_features])  # (2, N, E)
        assignments = self._assignments(features[0], teacher_features[0])  # (B, N), N over all processes
        return losses.resa(embeddings, teacher, assignments, self.temperature)

    def _assignments(self, features: Tensor, teacher_features: Tensor) -> Tensor:
        return losses.self_assignments(features, gather(teacher_features), self.epsilon, self.sinkhorn_iterations)

    def update_teacher(self) -> None:
        """Move the teacher with the momentum of the next step: the released code moves it as that step starts."""
        ema.follow_all(self, self.teacher_momentum(self.progress_of(self.global_step + 1)))

    @property
    def evaluated_backbone(self) -> nn.Module:
        """The teacher."""
        return self.teacher_backbone

    def teacher_momentum(self, progress: float) -> float:
        """Rises to 1 along a cosine."""
        return cosine(self.momentum, 1.0, progress)

    def health(self, views: Sequence[Tensor]) -> dict[str, Tensor | float]:
        """Entropy of the assignment: 0 if each image is its own cluster, ln N if the features have collapsed."""
        assignments = self._assignments(self.backbone(views[0]), self.teacher_backbone(views[0]))
        return {"assignment_entropy": losses.entropy(assignments)}

    @property
    def chance_loss(self) -> float | None:
        """The entropy ln N: every image of the batch is as similar; known once a batch has been seen."""
        return None if self.global_batch is None else math.log(self.global_batch)
