"""MoCo v3."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssl_lightning import ema, losses
from ssl_lightning.backbones import initialization
from ssl_lightning.backbones.names import Backbone, is_vit, token_vit
from ssl_lightning.backbones.tokens import ViT
from ssl_lightning.grad_cache import checked_chunk_size, encode_in_chunks
from ssl_lightning.heads import mlp
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.optim import Optim
from ssl_lightning.schedules import cosine


class MoCoV3(SSLModule):
    """MoCo v3: a query finds its key among the keys of the batch; for ResNets and ViTs.

    Chen, Xie & He 2021, An Empirical Study of Training Self-Supervised Vision Transformers,
    https://arxiv.org/abs/2104.02057. The paper's encoder f_q is ``backbone``, ``projector`` and ``predictor``, f_m the
    teachers. BatchNorm is global. A ViT gets the paper's initialization, fixed sine-cosine positions and a frozen
    random patch projection; vit_small has 12 heads. The defaults are the ResNet-50 recipe of 100 epochs; ViTs are
    trained with ``temperature=0.2`` and AdamW, as in configs/moco_v3/imagenet_vit_small.yaml.

    Args:
        temperature: Divides the cosine similarities; 1.0 for ResNets, 0.2 for ViTs in the paper.
        momentum: Share of the teacher that stays at the first step; it rises to 1 along a cosine.
        hidden_dim: Width of the hidden layers of projector and predictor.
        projector_dim: Width of queries and keys.
        backbone: Name of a timm or torchvision model.
        backbone_kwargs: Arguments that build the backbone.
        optim: Optimizer and learning-rate schedule.
        chunk_size: Most images per backbone pass, for batches larger than memory: the loss still spans the whole batch.
            None takes the batch in one pass; chunks cost an extra forward pass.
        kwargs: See SSLModule.
    """

    views = "moco_v3"
    drops_tokens = True
    remedies = "a lower learning rate or a longer warm-up, a temperature of 0.2 to 1, for ViTs fixed patch projections"
    global_views = 2
    batch_norm = "global"

    def __init__(
        self,
        temperature: float = 1.0,
        momentum: float = 0.99,
        hidden_dim: int = 4096,
        projector_dim: int = 256,
        backbone: Backbone = "resnet50",
        backbone_kwargs: dict[str, Any] | None = None,
        optim: Optim = Optim("lars", base_lr=0.6, weight_decay=1e-6),
        chunk_size: int | None = None,
        **kwargs: Any,
    ) -> None:

        if is_vit(backbone) and not (backbone_kwargs or {}).get("pretrained", False):
            paper = {"weight_init": "moco", **({"num_heads": 12} if backbone.startswith("vit_small") else {})}
            backbone_kwargs = {**paper, **(backbone_kwargs or {})}
        super().__init__(backbone, backbone_kwargs, optim, **kwargs)
        self.temperature, self.momentum = temperature, momentum
        self.chunk_size = checked_chunk_size(chunk_size)
        vit = isinstance(self.backbone, ViT)
        if vit:
            self.views = "moco_v3_vit"
            if not self.pretrained:
                initialization.moco_v3(token_vit("MoCoV3", backbone, self.backbone, tokens="plain"))
            if self.continued is not None and self.continued.train_patch_embed:
                self.backbone.patch_embed.requires_grad_(True)
        layers = 3 if vit else 2
        last_norms = [nn.BatchNorm1d(projector_dim, affine=False) for _ in range(2)]
        self.projector = mlp([self.embed_dim] + [hidden_dim] * (layers - 1) + [projector_dim], last_norm=last_norms[0])
        self.predictor = mlp([projector_dim, hidden_dim, projector_dim], last_norm=last_norms[1] if vit else None)
        self.teacher_backbone = ema.teacher_of(self.backbone)
        self.teacher_projector = ema.teacher_of(self.projector)

    def training_loss(self, views: Sequence[Tensor]) -> Tensor:
        """InfoNCE of queries with the other view's keys, in both directions (algorithm 1).

        Each view has its own forward pass and so its own BatchNorm statistics.
        """
        h1, h2 = (encode_in_chunks(self.backbone, [view], self.chunk_size) for view in views)  # (B, embed_dim)
        q1, q2 = (self.predictor(self.projector(h)) for h in (h1, h2))  # (B, projector_dim)
        with torch.no_grad():
            h1, h2 = (encode_in_chunks(self.teacher_backbone, [view], self.chunk_size) for view in views)
            k1, k2 = (self.teacher_projector(h) for h in (h1, h2))
        loss12 = losses.moco_v3(q1, k2, self.temperature, self.chunk_size)
        return loss12 + losses.moco_v3(q2, k1, self.temperature, self.chunk_size)

    def teacher_momentum(self, progress: float) -> float:
        """Rises to 1 along a cosine."""
        return cosine(self.momentum, 1.0, progress)

    def update_teacher(self) -> None:
        """Move the teacher with the momentum of the next step: the released code moves it as that step starts."""
        momentum = self.teacher_momentum(self.progress_of(self.global_step + 1))
        ema.follow_all(self, momentum)

    @property
    def chance_loss(self) -> float | None:
        """4 * temperature * ln N: every candidate is as likely as the key; known once a batch has been seen."""
        return None if self.global_batch is None else 4 * self.temperature * math.log(self.global_batch)
