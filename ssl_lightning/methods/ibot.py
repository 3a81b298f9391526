"""iBOT."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssl_lightning import ema, losses
from ssl_lightning.backbones import initialization
from ssl_lightning.backbones.names import Backbone, token_vit, vit_defaults
from ssl_lightning.backbones.tokens import ViT, called_blocks, grid_of, masked_tokens, multi_crop, patch_tokens
from ssl_lightning.heads import DINOHead, IBOTHead
from ssl_lightning.masks import block_masks, checked_crop_masks, masked_patches, random_masks
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.optim import Optim, clip_each
from ssl_lightning.schedules import Warmup, cosine


class IBOT(SSLModule):
    """iBOT: DINO on class tokens, and the same on masked patches, which the teacher sees and the student does not.

    Zhou et al. 2022, Image BERT Pre-Training with Online Tokenizer, https://arxiv.org/abs/2111.07832. For ViTs of timm.
    The probes read the teacher. Defaults: the published ViT-S/16, with a final rate of 1e-6 at a batch of 1,024.

    Args:
        num_prototypes: Number of outputs K of the head.
        shared_head: Whether patches are compared with the class token's prototypes, or with as many of their own.
        mask_ratio: Smallest and largest share of patches to mask in a masked crop.
        masked_share: Share of the global crops that are masked.
        mask_shape: ``blocks`` or single patches, ``random``; the released code has both (79.5 and 79.8 % linear top-1).
        student_temperature: Divides the student's logits.
        teacher_temperature: Divides the teacher's centered logits of class tokens.
        teacher_patch_temperature: Divides the teacher's centered logits of patches.
        warmup_teacher_temperature: Both teacher temperatures of the first epoch.
        warmup_teacher_temperature_epochs: Epochs in which they rise linearly to their final values.
        momentum: Share of the teacher that stays at the first step; it rises to 1 along a cosine.
        center_momentum: Share of the centers that stays at each step.
        hidden_dim: Width of the head's hidden layers.
        bottleneck_dim: Width of the head's bottleneck.
        norm_last_layer: Whether the norms of the prototypes stay 1 (published for ViT-B and larger).
        freeze_last_layer: Number of epochs at the start in which the prototypes are frozen.
        clip_gradient: Largest gradient norm of each parameter, clipped separately; 0 for no clipping.
        drop_path: Stochastic depth of the student: rate of the last block, rising linearly from 0.
        backbone: Name of a ViT of timm.
        backbone_kwargs: Arguments that build the backbone, e.g. ``{img_size: 32, patch_size: 4}``.
        optim: Optimizer and learning-rate schedule.
        kwargs: See SSLModule.
    """

    views, collapsed_loss, global_views, local_views = "ibot", 0.0, 2, True
    batch_norm = "global"
    remedies = "teacher temperatures of 0.04 to 0.07 with their warm-up, centering on, a lower learning rate"
    backbone: ViT
    teacher_backbone: ViT

    def __init__(
        self,
        num_prototypes: int = 8192, shared_head: bool = True, mask_ratio: tuple[float, float] = (0.1, 0.5),
        masked_share: float = 0.5, mask_shape: Literal["blocks", "random"] = "blocks",
        student_temperature: float = 0.1, teacher_temperature: float = 0.07, teacher_patch_temperature: float = 0.07,
        warmup_teacher_temperature: float = 0.04, warmup_teacher_temperature_epochs: int = 30,
        momentum: float = 0.996, center_momentum: float = 0.9, hidden_dim: int = 2048, bottleneck_dim: int = 256,
        norm_last_layer: bool = False, freeze_last_layer: int = 1, clip_gradient: float = 3.0, drop_path: float = 0.1,
        backbone: Backbone = "vit_small_patch16_224", backbone_kwargs: dict[str, Any] | None = None,
        optim: Optim = Optim("adamw", 5e-4, weight_decay=0.04, end_weight_decay=0.4, warmup_inclusive=True,
                             end_lr_factor=5e-4),
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(backbone, vit_defaults(backbone, backbone_kwargs, drop_path_rate=drop_path), optim, **kwargs)
        vit = token_vit("IBOT", backbone, self.backbone, tokens="class")
        if not self.pretrained:
            initialization.dino(vit)
        checked_crop_masks(mask_ratio, masked_share)
        self.mask_ratio, self.masked_share, self.mask_shape = mask_ratio, masked_share, mask_shape
        start, epochs = warmup_teacher_temperature, warmup_teacher_temperature_epochs
        self.teacher_temperatures = Warmup(start, teacher_temperature, epochs)
        self.teacher_patch_temperatures = Warmup(start, teacher_patch_temperature, epochs)
        self.student_temperature, self.momentum, self.center_momentum = student_temperature, momentum, center_momentum
        self.freeze_last_layer, self.clip_gradient = freeze_last_layer, clip_gradient
        head = DINOHead if shared_head else IBOTHead
        self.projector = head(self.embed_dim, hidden_dim, bottleneck_dim, num_prototypes, norm_last_layer)
        self.mask_token = nn.Parameter(torch.zeros(1, self.embed_dim))
        self.teacher_backbone = ema.teacher_of(vit)
        self.teacher_projector = ema.teacher_of(self.projector)
        self.center, self.patch_center = (nn.Buffer(torch.zeros(num_prototypes)) for _ in range(2))

    def training_loss(self, views: Sequence[Tensor]) -> Tensor:
        """Cross entropies of class tokens across views and of masked patches within them (algorithm 1)."""
        crops = torch.cat(list(views[:2]))  # (2B, 3, S, S)
        mask = self.draw_masks(crops)  # (2B, N), on the CPU
        masked, counts = (self.random_to_device(part) for part in masked_patches(mask))  # (M,)
        with torch.no_grad():
            teacher, teacher_patches = self._teacher_logits(crops)  # (2B, K), (2B, N, K)
        self.defer(means=teacher.mean(0).to(self.center.dtype))
        self.defer(patch_means=teacher_patches.mean((0, 1)).to(self.center.dtype))

        tokens = masked_tokens(self.backbone, crops, self.random_to_device(mask), self.mask_token)
        features = self.backbone.forward_head(tokens)  # (2B, embed_dim)
        if len(views) > 2:
            features = torch.cat([features, multi_crop(self.backbone, views[2:])])  # (V * B, embed_dim)
        student = self.projector(features).unflatten(0, (len(views), -1))  # (V, B, K)
        student_patches = self.projector.of_patches(patch_tokens(self.backbone, tokens).flatten(0, 1)[masked])  # (M, K)

        temperature, patch_temperature = self.current_teacher_temperatures
        teacher = teacher.unflatten(0, (2, -1))  # (2, B, K)
        image_loss = losses.dino(student, teacher, self.center, self.student_temperature, temperature)
        targets = self._patch_targets(teacher_patches.flatten(0, 1)[masked], patch_temperature)  # (M, K)
        return image_loss + losses.ibot(student_patches, targets, counts, self.student_temperature)

    def update_teacher(self) -> None:
        """Move the teacher with the momentum of the step just taken, and the centers by the teacher's mean logits."""
        ema.follow_all(self, self.teacher_momentum(self.progress))
        ema.follow_mean(self.center, self.deferred("means"), self.center_momentum)
        ema.follow_mean(self.patch_center, self.deferred("patch_means"), self.center_momentum)

    def edit_gradients(self) -> None:
        """Clip each parameter's gradient on its own, then drop the gradients of frozen prototypes."""
        clip_each(self.parameters(), self.clip_gradient)
        if self.current_epoch < self.freeze_last_layer:
            self.projector.drop_prototype_gradients()

    def _teacher_logits(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(2B, K)`` of class tokens and ``(2B, N, K)`` of patches."""
        tokens = self.teacher_backbone.forward_features(crops)  # (2B, prefix + N, embed_dim)
        features = self.teacher_backbone.forward_head(tokens)  # (2B, embed_dim)
        self.record(features)
        return self.teacher_projector(features), self.teacher_projector.of_patches(patch_tokens(self.backbone, tokens))

    def _patch_targets(self, logits: Tensor, temperature: float) -> Tensor:
        return ((logits.to(self.center.dtype) - self.patch_center) / temperature).softmax(-1)

    def draw_masks(self, crops: Tensor) -> Tensor:
        """Masks ``(2B, N)`` on the CPU, true where masked: the same for an image on any number of processes.

        Args:
            crops: ``(2B, 3, S, S)``.
        """
        rows, columns = grid_of(self.backbone, crops)
        grid, smallest, (low, high) = (rows, columns), (min(rows, columns) // 3) ** 2, self.mask_ratio
        masks = []
        for view in crops.chunk(2):
            chosen, ratios = self.uniform(len(view), 2).unbind(1)
            ratios = torch.where(chosen < self.masked_share, low + (high - low) * ratios, 0)
            counts = [int(ratio * rows * columns) for ratio in ratios.tolist()]
            seeds = self.seeds_of_images(len(view))
            if self.mask_shape == "random":
                masks.append(random_masks(grid, counts, seeds))
            else:
                masks.append(block_masks(grid, counts, smallest, rows * columns, seeds))
        return torch.cat(masks)

    @property
    def current_teacher_temperatures(self) -> tuple[float, float]:
        """Teacher temperatures of this epoch, of class tokens and of patches."""
        return self.teacher_temperatures(self.current_epoch), self.teacher_patch_temperatures(self.current_epoch)

    def teacher_momentum(self, progress: float) -> float:
        """Rises to 1 along a cosine."""
        return cosine(self.momentum, 1.0, progress)

    @property
    def evaluated_backbone(self) -> nn.Module:
        """The teacher."""
        return self.teacher_backbone

    @property
    def compiled_parts(self) -> list[nn.Module]:
        """The blocks of student and teacher."""
        return [*called_blocks(self.backbone), *called_blocks(self.teacher_backbone)]

    def health(self, views: Sequence[Tensor]) -> dict[str, Tensor | float]:
        """Entropies of the teacher's assignments, of views and of patches, and the share of prototypes in use."""
        logits, patch_logits = self._teacher_logits(torch.cat(list(views[:2])))
        temperature, patch_temperature = self.current_teacher_temperatures
        assignments = ((logits.float() - self.center) / temperature).softmax(1)  # (2B, K)
        patch_assignments = self._patch_targets(patch_logits.flatten(0, 1), patch_temperature)  # (2B * N, K)
        return {
            "teacher_entropy": losses.entropy(assignments),
            "patch_entropy": losses.entropy(patch_assignments),
            "prototypes_in_use": losses.share_in_use(assignments),
        }

    @property
    def chance_loss(self) -> float:
        """Every prototype is as likely: ln K of views, and of the patches of the crops that are masked."""
        return (1 + self.masked_share) * math.log(len(self.center))
