"""iBOT."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssl_lightning import ema, losses
from ssl_lightning.backbones.names import is_vit, token_vit
from ssl_lightning.backbones.tokens import masked_tokens, multi_crop
from ssl_lightning.distributed import own_part, world_size
from ssl_lightning.heads import DINOHead, IBOTHead
from ssl_lightning.masks import block_mask, masked_patches, random_mask
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.optim import Optim, clip_each
from ssl_lightning.schedules import cosine, warmed_up


class IBOT(SSLModule):
    """iBOT: DINO on class tokens, and the same on masked patches, which the teacher sees and the student does not.

    Zhou et al. 2022, iBOT: Image BERT Pre-Training with Online Tokenizer, https://arxiv.org/abs/2111.07832. For ViTs of
    timm. The student sees the global crops masked and the local ones whole; the probes read the teacher. The defaults
    are those of the published ViT-S/16; ``optim.end_lr_factor`` gives its final rate of 1e-6 at a batch of 1,024.

    Args:
        num_prototypes: Number of outputs K of the head.
        shared_head: Whether patches are compared with the class token's prototypes, or with as many of their own.
        mask_ratio: Smallest and largest share of patches to mask in a masked crop.
        masked_share: Share of the global crops that are masked.
        mask_shape: Whether they are masked in ``blocks`` or in single patches, ``random``; the released code has both
            (ViT-B/16: 79.5 and 79.8 % linear top-1).
        student_temperature: Divides the student's logits.
        teacher_temperature: Divides the teacher's centred logits of class tokens.
        teacher_patch_temperature: Divides the teacher's centred logits of patches.
        warmup_teacher_temperature: Both teacher temperatures of the first epoch.
        warmup_teacher_temperature_epochs: Epochs in which they rise linearly to their final values.
        momentum: Share of the teacher that stays at the first step; it rises to 1 along a cosine.
        center_momentum: Share of the centres that stays at each step.
        hidden_dim: Width of the head's hidden layers.
        bottleneck_dim: Width of the head's bottleneck.
        norm_last_layer: Whether the norms of the prototypes stay 1 (published for ViT-B and larger).
        freeze_last_layer: Epochs in which the prototypes stay as they are.
        clip_gradient: Largest norm of the gradient of each parameter, one by one; 0 for none.
        drop_path: Stochastic depth of the student: rate of the last block, rising linearly from 0.
        backbone: Name of a ViT of timm.
        backbone_kwargs: Arguments of the backbone's builder, e.g. ``{img_size: 32, patch_size: 4}``.
        optim: Optimizer and learning-rate schedule.
        kwargs: See SSLModule.
    """

    views = "ibot"
    collapsed_loss = 0.0
    remedies = "teacher temperatures of 0.04 to 0.07 with their warm-up, centering on, a lower learning rate"
    global_views = 2
    local_views = True

    def __init__(
        self,
        num_prototypes: int = 8192,
        shared_head: bool = True,
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        masked_share: float = 0.5,
        mask_shape: Literal["blocks", "random"] = "blocks",
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        teacher_patch_temperature: float = 0.07,
        warmup_teacher_temperature: float = 0.04,
        warmup_teacher_temperature_epochs: int = 30,
        momentum: float = 0.996,
        center_momentum: float = 0.9,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = False,
        freeze_last_layer: int = 1,
        clip_gradient: float = 3.0,
        drop_path: float = 0.1,
        backbone: str = "vit_small_patch16_224",
        backbone_kwargs: dict[str, Any] | None = None,
        optim: Optim = Optim(
            "adamw", base_lr=5e-4, weight_decay=0.04, end_weight_decay=0.4, warmup_inclusive=True, end_lr_factor=5e-4
        ),
        **kwargs: Any,
    ) -> None:

        if is_vit(backbone):
            backbone_kwargs = {"drop_path_rate": drop_path, **(backbone_kwargs or {})}
        super().__init__(backbone, backbone_kwargs, optim, **kwargs)
        vit = token_vit("IBOT", backbone, self.backbone, class_token=True)
        if not (backbone_kwargs or {}).get("pretrained"):
            nn.init.trunc_normal_(vit.cls_token, std=0.02)  # type: ignore[arg-type]
        self.prefix, self.patch_side = vit.num_prefix_tokens, vit.patch_side
        self.mask_ratio, self.masked_share, self.mask_shape = mask_ratio, masked_share, mask_shape
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.teacher_patch_temperature = teacher_patch_temperature
        self.warmup_teacher_temperature = warmup_teacher_temperature
        self.warmup_teacher_temperature_epochs = warmup_teacher_temperature_epochs
        self.momentum, self.center_momentum = momentum, center_momentum
        self.freeze_last_layer, self.clip_gradient = freeze_last_layer, clip_gradient
        head = DINOHead if shared_head else IBOTHead
        self.patches: dict[str, bool] = {} if shared_head else {"patches": True}
        self.projector = head(self.embed_dim, hidden_dim, bottleneck_dim, num_prototypes, norm_last_layer)
        self.mask_token = nn.Parameter(torch.zeros(1, self.embed_dim))
        self.teacher_backbone = ema.teacher_of(self.backbone)
        self.teacher_projector = ema.teacher_of(self.projector)
        self.center: Tensor
        self.patch_center: Tensor
        self.register_buffer("center", torch.zeros(num_prototypes))
        self.register_buffer("patch_center", torch.zeros(num_prototypes))

    @property
    def evaluated_backbone(self) -> nn.Module:
        """The teacher."""
        return self.teacher_backbone

    @property
    def compiled_parts(self) -> list[nn.Module]:
        """The blocks of student and teacher."""
        return [self.backbone.blocks, self.teacher_backbone.blocks]  # type: ignore[list-item]

    def training_loss(self, views: Sequence[Tensor]) -> Tensor:
        """Cross entropies of class tokens across views and of masked patches within them (algorithm 1)."""
        crops = torch.cat(list(views[:2]))  # (2B, 3, S, S)
        mask = self._masks(crops)  # (2B, N), on the CPU
        masked, counts = (self.random_to_device(part) for part in masked_patches(mask))  # (M,)
        with torch.no_grad():
            teacher, teacher_patches = self._teacher_logits(crops)  # (2B, K), (2B, N, K)
        means = torch.cat([teacher.mean(0), teacher_patches.mean((0, 1))])
        self._pending.append(means.to(self.center.dtype))

        tokens = masked_tokens(self.backbone, crops, self.random_to_device(mask), self.mask_token)
        features = [self.backbone.forward_head(tokens)]  # type: ignore[operator]
        if len(views) > 2:
            features.append(multi_crop(self.backbone, views[2:]))
        student = self.projector(torch.cat(features))  # (V * B, K)
        student_patches = self.projector(tokens[:, self.prefix :].flatten(0, 1)[masked], **self.patches)  # (M, K)

        temperature, patch_temperature = self.current_teacher_temperatures
        student, teacher = student.unflatten(0, (len(views), -1)), teacher.unflatten(0, (2, -1))
        of_images = losses.dino(student, teacher, self.center, self.student_temperature, temperature)
        assignments = self._patch_assignments(teacher_patches.flatten(0, 1)[masked], patch_temperature)
        return of_images + losses.ibot(student_patches, assignments, counts, self.student_temperature)

    def _teacher_logits(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(2B, K)`` of class tokens and ``(2B, N, K)`` of patches."""
        tokens = self.teacher_backbone.forward_features(crops)  # type: ignore[operator] # (2B, prefix + N, embed_dim)
        features = self.teacher_backbone.forward_head(tokens)  # type: ignore[operator]
        self.record(features)
        return self.teacher_projector(features), self.teacher_projector(tokens[:, self.prefix :], **self.patches)

    def _patch_assignments(self, logits: Tensor, temperature: float) -> Tensor:
        return ((logits.to(self.center.dtype) - self.patch_center) / temperature).softmax(-1)

    def _masks(self, crops: Tensor) -> Tensor:
        """Masks ``(2B, N)`` on the CPU, true where masked: the same for an image on any number of processes."""
        rows, columns = grid = crops.shape[2] // self.patch_side, crops.shape[3] // self.patch_side
        smallest, largest = (min(grid) // 3) ** 2, rows * columns
        low, high = self.mask_ratio
        masks = []
        for _ in range(2):
            images = len(crops) // 2
            chosen, ratios = own_part(torch.rand(images * world_size(), 2, generator=self.generator)).unbind(1)
            ratios = torch.where(chosen < self.masked_share, low + (high - low) * ratios, 0)
            for ratio, seed in zip(ratios.tolist(), self.seeds_of_images(images), strict=True):
                count = int(ratio * rows * columns)
                if self.mask_shape == "random":
                    masks.append(random_mask(grid, count, seed))
                else:
                    masks.append(block_mask(grid, count, smallest, largest, seed))
        return torch.stack(masks).flatten(1)

    @property
    def current_teacher_temperatures(self) -> tuple[float, float]:
        """Teacher temperatures of this epoch, of class tokens and of patches."""
        start, epochs = self.warmup_teacher_temperature, self.warmup_teacher_temperature_epochs
        return (
            warmed_up(start, self.teacher_temperature, self.current_epoch, epochs),
            warmed_up(start, self.teacher_patch_temperature, self.current_epoch, epochs),
        )

    def teacher_momentum(self, progress: float) -> float:
        """Rises to 1 along a cosine."""
        return cosine(self.momentum, 1.0, progress)

    def update_teacher(self) -> None:
        """Move the teacher with the momentum of the step just taken, and the centres by the teacher's mean logits."""
        momentum = self.teacher_momentum(self.progress)
        ema.follow(self.teacher_backbone, self.backbone, momentum)
        ema.follow(self.teacher_projector, self.projector, momentum)
        means = [mean.chunk(2) for mean in self._take_pending()]
        ema.follow_mean(self.center, [mean for mean, _ in means], self.center_momentum)
        ema.follow_mean(self.patch_center, [mean for _, mean in means], self.center_momentum)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each parameter's gradient on its own, then drop those of frozen prototypes."""
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        clip_each(self.parameters(), self.clip_gradient)
        if self.current_epoch < self.freeze_last_layer:
            self.projector.drop_prototype_gradients()

    def health(self, views: Sequence[Tensor]) -> dict[str, Tensor | float]:
        """Entropies of the teacher's assignments, of views and of patches, and the share of prototypes in use."""
        logits, patches = self._teacher_logits(torch.cat(list(views[:2])))
        temperature, patch_temperature = self.current_teacher_temperatures
        assignments = ((logits.float() - self.center) / temperature).softmax(1)  # (2B, K)
        of_patches = self._patch_assignments(patches.flatten(0, 1), patch_temperature)  # (2B * N, K)
        return {
            "teacher_entropy": losses.entropy(assignments),
            "patch_entropy": losses.entropy(of_patches),
            "prototypes_in_use": losses.share_in_use(assignments),
        }

    @property
    def chance_loss(self) -> float:
        """Every prototype is as likely: ln K of views, and of the patches of the crops that are masked."""
        return (1 + self.masked_share) * math.log(len(self.center))
