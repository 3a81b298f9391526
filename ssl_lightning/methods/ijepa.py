"""I-JEPA."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lightning import ema, losses
from ssl_lightning.backbones.checkpointing import CheckpointedBlocks
from ssl_lightning.backbones.names import is_vit, token_vit
from ssl_lightning.backbones.tokens import sincos_positions
from ssl_lightning.distributed import own_part, world_size
from ssl_lightning.masks import multi_block, taken
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.optim import Optim


class IJEPA(SSLModule):
    """I-JEPA: predict the teacher's features of some blocks of an image from the rest of it.

    Assran et al. 2023, Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture,
    https://arxiv.org/abs/2301.08243. For ViTs of timm, built without a class token. The teacher sees the whole image;
    the probes read the mean of its patches. The defaults are those of the paper's ViT-B/16, at a batch of 2,048.

    Args:
        targets: Blocks to predict.
        target_scale: Smallest and largest share of the patches in such a block.
        target_aspect: Smallest and largest height / width of such a block.
        context_scale: Smallest and largest share of the patches in the block to predict from, targets not yet left out.
        min_context: Contexts with no more patches than this are drawn again.
        predictor_dim: Width of the predictor.
        predictor_depth: Blocks of the predictor; 12 for larger backbones. It has as many heads as the backbone.
        momentum: Share of the teacher that stays at the first step; it rises linearly to 1.
        backbone: Name of a ViT of timm.
        backbone_kwargs: Arguments of the backbone's builder, e.g. ``{img_size: 32, patch_size: 4}``;
            ``weight_init: jax`` starts wider than the paper, for small patches and widths.
        optim: Optimizer and learning-rate schedule.
        kwargs: See SSLModule.
    """

    views = "ijepa"
    collapsed_loss = 0.0
    remedies = "a momentum nearer to 1, a lower learning rate or a longer warm-up, larger targets"
    global_views = 1

    def __init__(
        self,
        targets: int = 4,
        target_scale: tuple[float, float] = (0.15, 0.2),
        target_aspect: tuple[float, float] = (0.75, 1.5),
        context_scale: tuple[float, float] = (0.85, 1.0),
        min_context: int = 10,
        predictor_dim: int = 384,
        predictor_depth: int = 6,
        momentum: float = 0.996,
        backbone: str = "vit_base_patch16_224",
        backbone_kwargs: dict[str, Any] | None = None,
        optim: Optim = Optim(
            "adamw",
            base_lr=1.25e-4,
            weight_decay=0.04,
            end_weight_decay=0.4,
            warmup_epochs=40,
            warmup_start_factor=0.2,
            end_lr_factor=0.001,
        ),
        **kwargs: Any,
    ) -> None:
        from timm.models.vision_transformer import Block

        if is_vit(backbone):  # fc_norm: tokens are normalised before they are pooled
            pooled = {"class_token": False, "global_pool": "avg", "fc_norm": False}
            backbone_kwargs = pooled | (backbone_kwargs or {})
        super().__init__(backbone, backbone_kwargs, optim, **kwargs)
        vit = token_vit("IJEPA", backbone, self.backbone, class_token=False)
        self.targets, self.target_scale, self.target_aspect = targets, target_scale, target_aspect
        self.context_scale, self.min_context = context_scale, min_context
        self.momentum, self.patch_side = momentum, vit.patch_side
        if not (backbone_kwargs or {}).get("pretrained"):
            if "weight_init" not in (backbone_kwargs or {}):
                vit.apply(_init_weights)
            vit.fix_positions(rows_first=False)
        self.teacher_backbone = ema.teacher_of(self.backbone)

        self.predictor_embed = nn.Linear(self.embed_dim, predictor_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, predictor_dim))
        self.predictor_positions = nn.Parameter(
            sincos_positions(predictor_dim, vit.patch_embed.grid_size, rows_first=False)[:, 1:].clone(),
            requires_grad=False,
        )
        norm: Any = functools.partial(nn.LayerNorm, eps=1e-6)
        heads: Any = vit.blocks[0].attn.num_heads  # type: ignore[union-attr]
        self.predictor_blocks = nn.Sequential(
            *(Block(predictor_dim, heads, qkv_bias=True, norm_layer=norm) for _ in range(predictor_depth))
        )
        self.predictor_norm = norm(predictor_dim)
        self.predictor_projection = nn.Linear(predictor_dim, self.embed_dim)
        if self.checkpoint_blocks:
            self.predictor_blocks.__class__ = CheckpointedBlocks
        for module in (self.predictor_embed, self.predictor_blocks, self.predictor_projection):
            module.apply(_init_weights)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    @property
    def evaluated_backbone(self) -> nn.Module:
        """The teacher."""
        return self.teacher_backbone

    @property
    def compiled_parts(self) -> list[nn.Module]:
        """The blocks of student, teacher and predictor."""
        return [self.backbone.blocks, self.teacher_backbone.blocks, self.predictor_blocks]  # type: ignore[list-item]

    def training_loss(self, views: Sequence[Tensor]) -> Tensor:
        """Distance of predicted and actual features of the target blocks (section 3)."""
        images = views[0]
        context, targets = self._blocks(images)  # (B, C), (B, T, P)
        with torch.no_grad():
            features = self._teacher_features(images)  # (B, N, embed_dim)
        actual = taken(features, targets.flatten(1)).unflatten(1, targets.shape[1:])  # (B, T, P, embed_dim)
        return losses.ijepa(self.predict(images, context, targets), actual)

    def predict(self, images: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        """Features ``(B, T, P, embed_dim)`` of the target blocks, predicted from the patches of the context.

        Args:
            images: ``(B, 3, S, S)``.
            context: Indices ``(B, C)`` of the patches that the student sees.
            targets: Indices ``(B, T, P)`` of the patches of each target block.
        """
        vit: Any = self.backbone
        patches = vit.patch_embed(images)  # (B, rows, columns, embed_dim)
        grid = patches.shape[1:3]
        patches = patches.flatten(1, 2) + vit.positions(*grid)
        tokens = self.predictor_embed(vit.norm(vit.blocks(taken(patches, context))))  # (B, C, predictor_dim)

        positions: Tensor = self.predictor_positions
        if grid != vit.patch_embed.grid_size:
            positions = sincos_positions(positions.shape[2], tuple(grid), False, positions.device)[:, 1:]
        positions = positions.to(tokens.dtype).expand(len(images), -1, -1)  # (B, N, predictor_dim)
        tokens = tokens + taken(positions, context)
        asked = self.mask_token.to(tokens.dtype) + taken(positions, targets.flatten(1))  # (B, T * P, predictor_dim)

        blocks, patches_of_block = targets.shape[1:]
        tokens = tokens.repeat_interleave(blocks, 0)  # (B * T, C, predictor_dim): each block is asked for alone
        tokens = torch.cat([tokens, asked.unflatten(1, (blocks, -1)).flatten(0, 1)], dim=1)
        tokens = self.predictor_norm(self.predictor_blocks(tokens))[:, -patches_of_block:]
        return self.predictor_projection(tokens).unflatten(0, (-1, blocks))

    def _teacher_features(self, images: Tensor) -> Tensor:
        """Features ``(B, N, embed_dim)`` of all patches, each of mean 0 and variance 1."""
        tokens = self.teacher_backbone.forward_features(images)  # type: ignore[operator]
        self.record(self.teacher_backbone.forward_head(tokens))  # type: ignore[operator]
        return F.layer_norm(tokens, tokens.shape[-1:])

    def _blocks(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Indices ``(B, C)`` of context and ``(B, T, P)`` of targets: this process's of the global batch's."""
        grid = images.shape[2] // self.patch_side, images.shape[3] // self.patch_side
        (seed,) = torch.randint(2**62, (1,), generator=self.generator).tolist()
        scales = self.target_scale, self.target_aspect, self.context_scale
        blocks = multi_block(len(images) * world_size(), grid, self.targets, *scales, self.min_context, seed)
        context, targets = (self.random_to_device(own_part(part)) for part in blocks)
        return context, targets

    def teacher_momentum(self, progress: float) -> float:
        """Rises to 1 along a line."""
        return self.momentum + progress * (1 - self.momentum)

    def update_teacher(self) -> None:
        """Move the teacher with the momentum of the step just taken."""
        ema.follow(self.teacher_backbone, self.backbone, self.teacher_momentum(self.progress))

    def health(self, views: Sequence[Tensor]) -> dict[str, Tensor | float]:
        """Error of the predicted features without drop path."""
        return {"masked_patch_error": self.training_loss(views)}

    @property
    def chance_loss(self) -> float:
        """The loss of predicting the mean, 0, of features that are normally distributed: 0.425."""
        beyond = math.erfc(1 / math.sqrt(2))  # P(|x| > 1)
        density = math.exp(-0.5) / math.sqrt(2 * math.pi)
        return (1 - beyond - 2 * density) / 2 + 2 * density - beyond / 2


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
