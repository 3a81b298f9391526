"""BEiT."""

import math
import pickle
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lightning import losses
from ssl_lightning.backbones import initialization
from ssl_lightning.backbones.names import BEIT_IN_PRETRAINING, Backbone, is_beit, token_vit, vit_defaults
from ssl_lightning.backbones.own import is_own
from ssl_lightning.backbones.tokens import called_blocks, grid_of, masked_tokens, number_of_patches, patch_tokens
from ssl_lightning.errors import UserError
from ssl_lightning.masks import block_masks, checked_ratio, masked_patches
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.methods.image_tokenizer import ImageTokenizer
from ssl_lightning.optim import Optim


class BEiT(SSLModule):
    """BEiT: predict the visual words of masked patches.

    Bao et al. 2022, BEiT: BERT Pre-Training of Image Transformers, https://arxiv.org/abs/2106.08254. The encoder is
    ``backbone`` and sees all patches, masked patches as a learned token. Defaults: the run on ImageNet-1k of the README
    of the released code, whose ViT has a bias for relative positions that all blocks share. timm's plain ViTs embed
    absolute positions instead. The words come from ``tokenizer``, which is frozen and not saved with the
    checkpoint: keep its file. As with MAE, the linear probe learns from whole views at every ``probe_every``-th step;
    features are the mean of the patches, as in fine-tuning.

    Args:
        tokenizer: Checkpoint of an ``ImageTokenizer``, or any module that maps images ``(B, 3, S, S)`` to the words of
            their patches, ``(B, N)`` integers, row by row. If it has a ``stride`` (side in pixels of the square that a
            word stands for), the crop is resized so that each patch has a word; otherwise the crop is used as it is.
        num_tokens: Number of words K of the tokenizer.
        mask_ratio: Share of the patches that are masked, in rectangles.
        smallest_block: Smallest rectangle, in patches.
        probe_every: The probes get features of whole views once every this many steps.
        backbone: Name of a ViT or BEiT of timm. The latter takes images of one size, ``img_size``.
        backbone_kwargs: Arguments that build the backbone, e.g. ``{img_size: 32, patch_size: 4}``.
        optim: Optimizer and learning-rate schedule.
        kwargs: See SSLModule.
    """

    views, global_views = "beit", 1
    remedies = "a tokenizer with many words in use, a lower learning rate or a longer warm-up, gradients clipped at 3"
    undecayed, unsaved_arguments = ("cls_token", "pos_embed"), ("tokenizer",)

    def __init__(
        self,
        tokenizer: str | nn.Module = "", num_tokens: int = 8192, mask_ratio: float = 75 / 196,
        smallest_block: int = 16, probe_every: int = 32,
        backbone: Backbone = "beit_base_patch16_224", backbone_kwargs: dict[str, Any] | None = None,
        optim: Optim = Optim("adamw", 1.5e-3, lr_scaling="none", weight_decay=0.05, end_lr_factor=1 / 150,
                             warmup_epochs=10, warmup_inclusive=True),
        **kwargs: Any,
    ) -> None:  # fmt: skip
        averaged = vit_defaults(backbone, None, global_pool="avg", fc_norm=False, init_values=0.1)
        defaults = {**(BEIT_IN_PRETRAINING if is_beit(backbone) else averaged), "drop_path_rate": 0.1}
        defaults = {} if is_own(backbone) else defaults
        super().__init__(backbone, {**defaults, **(backbone_kwargs or {})}, optim, **kwargs)
        if not is_beit(backbone):
            token_vit("BEiT", backbone, self.backbone)
        self.save_hyperparameters({"tokenizer": tokenizer if isinstance(tokenizer, str) else ""})
        self.num_tokens, self.mask_ratio = num_tokens, checked_ratio(mask_ratio)
        self.smallest_block, self.probe_every = smallest_block, probe_every
        self.mask_token = nn.Parameter(torch.empty(1, 1, self.embed_dim))
        self.head = nn.Linear(self.embed_dim, num_tokens).apply(initialization.narrow_linear)
        if self.pretrained:
            initialization.narrow(self.mask_token)
        else:
            initialization.beit(self.backbone, self.mask_token)
        self._given = (tokenizer,)  # in a tuple, so that it is no part of the method
        self._tokenizer: tuple[nn.Module, ...] = ()

    def training_loss(self, views: Sequence[Tensor]) -> Tensor:
        """Cross entropy of the masked patches' words (eq. 2)."""
        return losses.beit(*self._logits_and_words(views[0]))

    def _logits_and_words(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(M, K)`` and words ``(M,)`` of the M masked patches of all images, row by row."""
        mask = self.draw_masks(images)  # (B, N), on the CPU
        masked = self.random_to_device(masked_patches(mask)[0])  # (M,)
        tokens = masked_tokens(self.backbone, images, self.random_to_device(mask), self.mask_token)
        patches = patch_tokens(self.backbone, tokens).flatten(0, 1)  # (B * N, embed_dim)
        return self.head(patches[masked]), self.words(images).flatten()[masked]

    def draw_masks(self, images: Tensor) -> Tensor:
        """Which patches to mask, ``(B, N)`` bool on the CPU: rectangles until there are enough (algorithm 1).

        Args:
            images: ``(B, 3, S, S)``.
        """
        rows, columns = grid_of(self.backbone, images)
        count = round(self.mask_ratio * rows * columns)
        counts, seeds = [count] * len(images), self.seeds_of_images(len(images))
        return block_masks((rows, columns), counts, self.smallest_block, count, seeds)

    @torch.no_grad()
    def words(self, images: Tensor) -> Tensor:
        """Words ``(B, N)`` of all patches, from the same crop at the size at which the tokenizer has as many places.

        Args:
            images: ``(B, 3, S, S)``.
        """
        rows, columns = grid_of(self.backbone, images)
        stride: Any = getattr(self.tokenizer, "stride", images.shape[2] // rows)
        size = rows * stride, columns * stride
        if images.shape[2:] != size:
            images = F.interpolate(images, size=size, mode="bicubic", antialias=True)
        words = getattr(self.tokenizer, "tokens", self.tokenizer)(images)
        if words.shape != (len(images), rows * columns):
            raise UserError(
                f"the tokenizer gives words of shape {tuple(words.shape)} for a batch of {len(images)} crops of "
                f"{rows} x {columns} patches; it must give (B, N), one word for each patch."
            )
        return words

    @property
    def tokenizer(self) -> Any:
        """The frozen tokenizer, read when it is first needed."""
        if not self._tokenizer:
            (given,) = self._given
            tokenizer: Any = given if isinstance(given, nn.Module) else _read_tokenizer(given)
            known = getattr(tokenizer, "num_tokens", self.num_tokens)
            if known != self.num_tokens:
                raise UserError(f"the tokenizer knows {known} words; set --model.num_tokens to {known}.")
            self._tokenizer = (tokenizer.requires_grad_(False).eval().to(self.device, self.dtype),)
        return self._tokenizer[0]

    @property
    def compiled_parts(self) -> list[nn.Module]:
        """The blocks of the encoder."""
        return called_blocks(self.backbone)

    def check(self, sizes: list[int], global_batch: int) -> None:
        """There must be a tokenizer, and rectangles must be no larger than what is to be masked."""
        super().check(sizes, global_batch)
        patches = number_of_patches(self.backbone, sizes[0])
        if self.smallest_block > (count := round(self.mask_ratio * patches)):
            raise UserError(
                f"--model.smallest_block={self.smallest_block} is more than {count}, the patches to mask of {patches}; "
                "set it lower, or smaller patches in --model.backbone_kwargs."
            )
        _ = self.tokenizer

    def health(self, views: Sequence[Tensor]) -> dict[str, Tensor | float]:
        """Share of the masked patches whose word is predicted."""
        return {"pretext_accuracy": losses.accuracy(*self._logits_and_words(views[0]))}

    @property
    def chance_loss(self) -> float:
        """The entropy ln K: every word is as likely."""
        return math.log(self.num_tokens)


def _read_tokenizer(path: str) -> ImageTokenizer:
    if not path:
        raise UserError(
            "BEiT predicts the words of a tokenizer; train one, e.g. python -m ssl_lightning fit --model "
            "ImageTokenizer --data ..., and set --model.tokenizer to its checkpoint."
        )
    try:
        return ImageTokenizer.load_from_checkpoint(path, map_location="cpu")
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"--model.tokenizer={path} is not the checkpoint of an ImageTokenizer: {error}") from error
