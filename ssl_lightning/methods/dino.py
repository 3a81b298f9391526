"""DINO."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssl_lightning import ema, losses
from ssl_lightning.backbones import initialization
from ssl_lightning.backbones.names import Backbone, vit_defaults
from ssl_lightning.backbones.tokens import multi_crop
from ssl_lightning.heads import DINOHead
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.optim import Optim, clip_each
from ssl_lightning.schedules import Warmup, cosine


class DINO(SSLModule):
    """DINO: a student predicts the teacher's distribution over prototypes from other crops of the image.

    Caron et al. 2021, Emerging Properties in Self-Supervised Vision Transformers, https://arxiv.org/abs/2104.14294. For
    ViTs and ResNets. The teacher sees the global crops, the student all; the probes read the teacher. BatchNorm is
    global. ``optim.end_lr_factor`` gives the paper's final rate of 1e-6 at its batch of 512.

    Args:
        num_prototypes: Number of outputs K of the head.
        student_temperature: Divides the student's logits.
        teacher_temperature: Divides the teacher's centered logits.
        warmup_teacher_temperature: Teacher temperature of the first epoch.
        warmup_teacher_temperature_epochs: Epochs in which the teacher temperature rises linearly to its final value.
        momentum: Share of the teacher that stays at the first step; it rises to 1 along a cosine. 0.9995 for batches
            of 256.
        center_momentum: Share of the center that stays at each step.
        hidden_dim: Width of the head's hidden layers.
        bottleneck_dim: Width of the head's bottleneck.
        norm_last_layer: Whether the prototypes keep norm 1.
        freeze_last_layer: Number of epochs at the start in which the prototypes are frozen.
        clip_gradient: Largest gradient norm of each parameter, clipped separately; 0 for no clipping.
        drop_path: Stochastic depth of a ViT student: rate of the last block, rising linearly from 0.
        backbone: Name of a timm or torchvision model.
        backbone_kwargs: Arguments that build the backbone.
        optim: Optimizer and learning-rate schedule.
        kwargs: See SSLModule.
    """

    views = "dino"
    drops_tokens = True
    collapsed_loss = 0.0
    remedies = "a teacher temperature of 0.04 to 0.07 with its warm-up, centering on, a lower learning rate"
    global_views, local_views = 2, True
    batch_norm = "global"
    zero_init_residual = False

    def __init__(
        self,
        num_prototypes: int = 65536, student_temperature: float = 0.1, teacher_temperature: float = 0.07,
        warmup_teacher_temperature: float = 0.04, warmup_teacher_temperature_epochs: int = 30,
        momentum: float = 0.996, center_momentum: float = 0.9,
        hidden_dim: int = 2048, bottleneck_dim: int = 256, norm_last_layer: bool = True,
        freeze_last_layer: int = 1, clip_gradient: float = 3.0, drop_path: float = 0.1,
        backbone: Backbone = "vit_small_patch16_224", backbone_kwargs: dict[str, Any] | None = None,
        optim: Optim = Optim("adamw", 5e-4, weight_decay=0.04, end_weight_decay=0.4, warmup_inclusive=True,
                             end_lr_factor=0.001),
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(backbone, vit_defaults(backbone, backbone_kwargs, drop_path_rate=drop_path), optim, **kwargs)
        if getattr(self.backbone, "cls_token", None) is not None and not self.pretrained:
            initialization.dino(self.backbone)
        self.student_temperature = student_temperature
        self.temperatures = Warmup(warmup_teacher_temperature, teacher_temperature, warmup_teacher_temperature_epochs)
        self.momentum, self.center_momentum = momentum, center_momentum
        self.freeze_last_layer, self.clip_gradient = freeze_last_layer, clip_gradient
        self.projector = DINOHead(self.embed_dim, hidden_dim, bottleneck_dim, num_prototypes, norm_last_layer)
        self.teacher_backbone = ema.teacher_of(self.backbone)
        self.teacher_projector = ema.teacher_of(self.projector)
        self.center = nn.Buffer(torch.zeros(num_prototypes))

    def training_loss(self, views: Sequence[Tensor]) -> Tensor:
        """Cross entropy between the teacher on global crops and the student on all others (algorithm 1)."""
        with torch.no_grad():
            teacher = self.teacher_projector(self.teacher_backbone(torch.cat(list(views[:2]))))  # (2B, K)
        student = self.projector(multi_crop(self.backbone, views))  # (V * B, K)
        self.defer(means=teacher.to(self.center.dtype).mean(0))
        student, teacher = student.unflatten(0, (len(views), -1)), teacher.unflatten(0, (2, -1))
        return losses.dino(student, teacher, self.center, self.student_temperature, self.current_teacher_temperature)

    def update_teacher(self) -> None:
        """Move the teacher with the momentum of the step just taken, and the center by the teacher's mean logits."""
        ema.follow_all(self, self.teacher_momentum(self.progress))
        ema.follow_mean(self.center, self.deferred("means"), self.center_momentum)

    def edit_gradients(self) -> None:
        """Clip each parameter's gradient on its own, then drop the gradients of frozen prototypes."""
        clip_each(self.parameters(), self.clip_gradient)
        if self.current_epoch < self.freeze_last_layer:
            self.projector.drop_prototype_gradients()

    @property
    def evaluated_backbone(self) -> nn.Module:
        """The teacher."""
        return self.teacher_backbone

    @property
    def current_teacher_temperature(self) -> float:
        """Teacher temperature of this epoch."""
        return self.temperatures(self.current_epoch)

    def teacher_momentum(self, progress: float) -> float:
        """Rises to 1 along a cosine."""
        return cosine(self.momentum, 1.0, progress)

    def health(self, views: Sequence[Tensor]) -> dict[str, Tensor | float]:
        """Entropy of the teacher's assignments, at most ln K, and the share of prototypes that are first of a view."""
        logits = self.teacher_projector(self.teacher_backbone(torch.cat(list(views[:2])))).float()
        assignments = ((logits - self.center) / self.current_teacher_temperature).softmax(1)  # (2B, K)
        return {"teacher_entropy": losses.entropy(assignments), "prototypes_in_use": losses.share_in_use(assignments)}

    @property
    def chance_loss(self) -> float:
        """The entropy ln K: every prototype is as likely."""
        return math.log(len(self.center))
