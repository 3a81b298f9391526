"""SimDINO."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssl_lightning import ema, losses
from ssl_lightning.backbones import initialization
from ssl_lightning.backbones.names import Backbone, vit_defaults
from ssl_lightning.backbones.tokens import multi_crop
from ssl_lightning.distributed import world_size
from ssl_lightning.heads import gelu_mlp
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.optim import Optim, clip_each
from ssl_lightning.schedules import cosine


class SimDINO(SSLModule):
    """SimDINO: DINO without prototypes, center and temperatures; the coding rate of the batch prevents collapse.

    Wu et al. 2025, Simplifying DINO via Coding Rate Regularization, https://arxiv.org/abs/2502.10385. For ViTs and
    ResNets. The teacher sees the global crops, the student all; the probes read the teacher. BatchNorm is global. The
    coding rate covers the images of all processes. By default the released code takes it for each process, with
    ``epsilon`` times the number of processes: on 8 devices of 64 images, 0.05 there acts as 0.4 on 64 images.

    Args:
        epsilon: Precision of the coding rate; smaller values push outputs apart more.
        coefficient: Weight of the cosine between the views of an image; the coding rate has weight 1.
        smooth: Whether the coding rate is taken of the mean of student and teacher, instead of the student.
        momentum: Share of the teacher that stays at the first step; it rises to 1 along a cosine.
        hidden_dim: Width of the projector's two hidden layers.
        projector_dim: Width D of the outputs; no more than the images of the batch, or not all directions can be used.
        clip_gradient: Largest gradient norm of each parameter, clipped separately; 0 for no clipping.
        drop_path: Stochastic depth of a ViT student: rate of the last block, rising linearly from 0.
        backbone: Name of a timm or torchvision model.
        backbone_kwargs: Arguments that build the backbone.
        optim: Optimizer and learning-rate schedule.
        kwargs: See SSLModule.
    """

    views = "simdino"
    remedies = "a smaller epsilon, smooth on, a batch larger than projector_dim, a lower learning rate"
    global_views, local_views = 2, True
    batch_norm = "global"
    drops_tokens = True
    zero_init_residual = False

    def __init__(
        self,
        epsilon: float = 0.05,
        coefficient: float = 1.0,
        smooth: bool = True,
        momentum: float = 0.996,
        hidden_dim: int = 2048,
        projector_dim: int = 256,
        clip_gradient: float = 3.0,
        drop_path: float = 0.1,
        backbone: Backbone = "vit_base_patch16_224",
        backbone_kwargs: dict[str, Any] | None = None,
        optim: Optim = Optim(
            "adamw",
            base_lr=5e-4,
            weight_decay=0.04,
            end_weight_decay=0.4,
            warmup_inclusive=True,
            end_lr_factor=0.001,
        ),
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, vit_defaults(backbone, backbone_kwargs, drop_path_rate=drop_path), optim, **kwargs)
        if getattr(self.backbone, "cls_token", None) is not None and not self.pretrained:
            initialization.dino(self.backbone)
        self.epsilon, self.coefficient, self.smooth = epsilon, coefficient, smooth
        self.momentum, self.projector_dim, self.clip_gradient = momentum, projector_dim, clip_gradient
        self.projector = gelu_mlp(self.embed_dim, hidden_dim, projector_dim)
        self.teacher_backbone = ema.teacher_of(self.backbone)
        self.teacher_projector = ema.teacher_of(self.projector)

    def training_loss(self, views: Sequence[Tensor]) -> Tensor:
        """Cosine between the teacher on global crops and the student on all others, and the student's coding rate."""
        return losses.simdino(*self._outputs(views), self.epsilon, self.coefficient, self.smooth)

    def _outputs(self, views: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The student's ``(V, B, D)`` and the teacher's ``(2, B, D)``."""
        with torch.no_grad():
            teacher = self.teacher_projector(self.teacher_backbone(torch.cat(list(views[:2]))))  # (2B, D)
        student = self.projector(multi_crop(self.backbone, views))  # (V * B, D)
        return student.unflatten(0, (len(views), -1)), teacher.unflatten(0, (2, -1))

    def update_teacher(self) -> None:
        """Move the teacher with the momentum of the step just taken."""
        ema.follow_all(self, self.teacher_momentum(self.progress))

    def edit_gradients(self) -> None:
        """Clip each parameter's gradient on its own."""
        clip_each(self.parameters(), self.clip_gradient)

    @property
    def evaluated_backbone(self) -> nn.Module:
        """The teacher."""
        return self.teacher_backbone

    def teacher_momentum(self, progress: float) -> float:
        """Rises to 1 along a cosine."""
        return cosine(self.momentum, 1.0, progress)

    def health(self, views: Sequence[Tensor]) -> dict[str, Tensor | float]:
        """Both parts of the loss, and what the expansion would be if the outputs had collapsed."""
        student, teacher = self._outputs(views)
        images = student.shape[1] * world_size()
        return {
            "compression": losses.compression(student, teacher),
            "expansion": losses.expansion(student, teacher, self.epsilon, self.smooth),
            "collapsed_expansion": losses.collapsed_expansion(images, self.projector_dim, self.epsilon),
        }

    @property
    def chance_loss(self) -> float | None:
        """The loss of outputs that are all the same; known once a batch has been seen."""
        if self.global_batch is None:
            return None
        return -self.coefficient - losses.collapsed_expansion(self.global_batch, self.projector_dim, self.epsilon)
