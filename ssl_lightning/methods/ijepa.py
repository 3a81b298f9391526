"""I-JEPA."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lightning import ema, losses
from ssl_lightning.backbones import initialization
from ssl_lightning.backbones.names import Backbone, token_vit, vit_defaults
from ssl_lightning.backbones.predictor import TokenPredictor
from ssl_lightning.backbones.tokens import ViT, called_blocks, grid_of, patch_tokens
from ssl_lightning.distributed import own_part, world_size
from ssl_lightning.masks import multi_block, taken
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.optim import Optim


class IJEPA(SSLModule):
    """I-JEPA: predict the teacher's features of some blocks of an image from the rest of it.

    Assran et al. 2023, Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture,
    https://arxiv.org/abs/2301.08243. For ViTs of timm, built without a class token. The teacher sees the whole image;
    the probes read the mean of its patches. Contexts have the length of the shortest of 128 images, the batch of a
    process in the released code. A step has the rate and decay that the released schedules give the step before it.
    Defaults: the paper's ViT-B/16, at a batch of 2,048.

    Args:
        targets: Blocks to predict.
        target_scale: Smallest and largest share of the patches in such a block.
        target_aspect: Smallest and largest height / width of such a block.
        context_scale: Smallest and largest share of the patches in the block to predict from, before targets are cut.
        min_context: Contexts with no more patches than this are drawn again.
        predictor_dim: Width of the predictor.
        predictor_depth: Blocks of the predictor; 12 for larger backbones. It has as many heads as the backbone.
        momentum: Share of the teacher that stays at the first step; it rises linearly to 1.
        backbone: Name of a ViT of timm.
        backbone_kwargs: Arguments that build the backbone, e.g. ``{img_size: 32, patch_size: 4}``;
            ``weight_init: jax`` starts wider than the paper, for small patches and widths.
        optim: Optimizer and learning-rate schedule.
        kwargs: See SSLModule.
    """

    views, collapsed_loss, global_views = "ijepa", 0.0, 1
    remedies = "a momentum nearer to 1, a lower learning rate or a longer warm-up, larger targets"
    renamed = {  # noqa: RUF012
        f"predictor_{part}": f"predictor.{part}" for part in ("embed", "positions", "blocks", "norm", "projection")
    }
    backbone: ViT
    teacher_backbone: ViT

    def __init__(
        self,
        targets: int = 4, target_scale: tuple[float, float] = (0.15, 0.2),
        target_aspect: tuple[float, float] = (0.75, 1.5), context_scale: tuple[float, float] = (0.85, 1.0),
        min_context: int = 10, predictor_dim: int = 384, predictor_depth: int = 6, momentum: float = 0.996,
        backbone: Backbone = "vit_base_patch16_224", backbone_kwargs: dict[str, Any] | None = None,
        optim: Optim = Optim("adamw", 1.25e-4, weight_decay=0.04, end_weight_decay=0.4, warmup_epochs=40,
                             warmup_start_factor=0.2, end_lr_factor=0.001),
        **kwargs: Any,
    ) -> None:  # fmt: skip
        # fc_norm: tokens are normalized before they are pooled
        pooled = {"class_token": False, "global_pool": "avg", "fc_norm": False}
        super().__init__(backbone, vit_defaults(backbone, backbone_kwargs, **pooled), optim, **kwargs)
        vit = token_vit("IJEPA", backbone, self.backbone, tokens="patches")
        self.targets, self.target_scale, self.target_aspect = targets, target_scale, target_aspect
        self.context_scale, self.min_context, self.momentum = context_scale, min_context, momentum
        if not self.pretrained:
            initialization.ijepa(vit, linear="weight_init" not in (backbone_kwargs or {}))
        self.teacher_backbone = ema.teacher_of(vit)
        attention: Any = getattr(vit.blocks[0], "attn", None)
        heads = getattr(attention, "num_heads", None) or math.gcd(predictor_dim, 12)
        self.predictor = TokenPredictor(
            *(self.embed_dim, predictor_dim, self.embed_dim, predictor_depth, heads),
            grid=grid_of(vit),
            class_token=False,
            checkpoint_blocks=self.checkpoint_blocks,
        ).apply(initialization.normal_linear)
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, predictor_dim), std=0.02))

    def training_loss(self, views: Sequence[Tensor]) -> Tensor:
        """Distance of predicted and actual features of the target blocks (section 3)."""
        images = views[0]
        contexts, targets = self.draw_blocks(images)  # (b, C) for b of the B images each, (B, T, P)
        with torch.no_grad():
            features = self._teacher_features(images)  # (B, N, embed_dim)
        actual = taken(features, targets.flatten(1)).unflatten(1, targets.shape[1:])  # (B, T, P, embed_dim)
        counts = [len(context) for context in contexts]
        parts = zip(images.split(counts), contexts, targets.split(counts), strict=True)
        return losses.ijepa(torch.cat([self.predict(*part) for part in parts]), actual)

    def predict(self, images: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        """Features ``(B, T, P, embed_dim)`` of the target blocks, predicted from the patches of the context.

        Args:
            images: ``(B, 3, S, S)``.
            context: Indices ``(B, C)`` of the patches that the student sees.
            targets: Indices ``(B, T, P)`` of the patches of each target block.
        """
        blocks, patches_per_block = targets.shape[1:]
        patches = patch_tokens(self.backbone, self.backbone.encode(images, context))  # (B, C, embed_dim)
        tokens = self.predictor.embed(patches)  # (B, C, predictor_dim)

        positions = self.predictor.positions_of(grid_of(self.backbone, images)).to(tokens.dtype)
        positions = positions.expand(len(images), -1, -1)  # (B, N, predictor_dim)
        tokens = tokens + taken(positions, context)
        queries = self.mask_token.to(tokens.dtype) + taken(positions, targets.flatten(1))  # (B, T * P, predictor_dim)

        tokens = tokens.repeat_interleave(blocks, 0)  # (B * T, C, predictor_dim): each block is predicted on its own
        tokens = torch.cat([tokens, queries.unflatten(1, (blocks, -1)).flatten(0, 1)], dim=1)
        return self.predictor(tokens, last=patches_per_block).unflatten(0, (-1, blocks))

    def update_teacher(self) -> None:
        """Move the teacher with the momentum of the step just taken."""
        ema.follow_all(self, self.teacher_momentum(self.progress))

    def _teacher_features(self, images: Tensor) -> Tensor:
        """Features ``(B, N, embed_dim)`` of all patches, each of mean 0 and variance 1."""
        tokens = self.teacher_backbone.forward_features(images)
        self.record(self.teacher_backbone.forward_head(tokens))
        return F.layer_norm(patch_tokens(self.backbone, tokens), tokens.shape[-1:])

    def draw_blocks(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Indices of contexts and targets: this process's part of the global batch's.

        Args:
            images: ``(B, 3, S, S)``.

        Returns:
            Contexts ``(b, C)`` of consecutive images, together B, each with another length C, and targets
            ``(B, T, P)``.
        """
        (seed,) = torch.randint(2**62, (1,), generator=self.generator).tolist()
        scales = self.target_scale, self.target_aspect, self.context_scale
        drawn = multi_block(
            len(images) * world_size(), grid_of(self.backbone, images), self.targets, *scales, self.min_context, seed
        )
        contexts, lengths, targets = (own_part(part) for part in drawn)
        runs = [(length, len([*same])) for length, same in itertools.groupby(lengths.tolist())]
        parts = zip(contexts.split([count for _, count in runs]), runs, strict=True)
        return [self.random_to_device(part[:, :length]) for part, (length, _) in parts], self.random_to_device(targets)

    @property
    def evaluated_backbone(self) -> nn.Module:
        """The teacher."""
        return self.teacher_backbone

    @property
    def compiled_parts(self) -> list[nn.Module]:
        """The blocks of student, teacher and predictor."""
        return [*called_blocks(self.backbone), *called_blocks(self.teacher_backbone), self.predictor.blocks]

    def teacher_momentum(self, progress: float) -> float:
        """Rises to 1 along a line."""
        return self.momentum + progress * (1 - self.momentum)

    def health(self, views: Sequence[Tensor]) -> dict[str, Tensor | float]:
        """Error of the predicted features without drop path."""
        return {"masked_patch_error": self.training_loss(views)}

    @property
    def chance_loss(self) -> float:
        """The loss of predicting the mean, 0, of features that are normally distributed: 0.425."""
        beyond = math.erfc(1 / math.sqrt(2))  # P(|x| > 1)
        density = math.exp(-0.5) / math.sqrt(2 * math.pi)
        return (1 - beyond - 2 * density) / 2 + 2 * density - beyond / 2
