"""Token dropout: a ViT that trains on random patches only."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssl_lightning.backbones.tokens import kept_tokens
from ssl_lightning.distributed import own_part, world_size
from ssl_lightning.errors import UserError


class TokenDropout(nn.Module):
    """Keeps random patches of each image in training, drawn for the global batch; other tokens all stay.

    Takes the place of timm's ``PatchDropout``, which draws on the device of each process. Positions are added before.

    Args:
        prefix: Number of tokens before the patches.

    Attributes:
        drop_prob: Share of the patches that are dropped, set before each step. A teacher, which is a copy, has 0.
        batch_size: Images of this process in the batch; rows beyond are further views.
        generator: Random numbers of the step, the same on every process; None outside a step.
    """

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix, self.drop_prob = prefix, 0.0
        self.batch_size: int | None = None
        self.generator: torch.Generator | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        """The kept tokens ``(V * B, prefix + M, D)``."""
        kept = self.drawn(tokens)
        return tokens if kept is None else kept_tokens(tokens, kept, self.prefix)

    @torch.compiler.disable  # it draws on the host
    def drawn(self, tokens: Tensor) -> Tensor | None:
        """Indices ``(V * B, M)`` of the patches to keep, in order; None keeps all.

        Args:
            tokens: ``(V * B, prefix + N, D)``.
        """
        rows, patches = len(tokens), tokens.shape[1] - self.prefix
        count = max(1, int((1 - self.drop_prob) * patches + 1e-6))
        if not self.training or count == patches:
            return None
        images = self.batch_size if self.batch_size and rows % self.batch_size == 0 else rows
        kept = []
        for _ in range(rows // images):
            seeds = torch.randint(2**62, (images * world_size(),), generator=self.generator)
            for seed in own_part(seeds).tolist():
                order = np.random.Generator(np.random.Philox(seed)).permutation(patches)
                kept.append(np.sort(order[:count]))
        indices = torch.from_numpy(np.stack(kept))
        pinned = indices.pin_memory() if tokens.is_cuda else indices
        return pinned.to(tokens.device, non_blocking=pinned is not indices)


def add_token_dropout(method: Any, rate: float) -> None:
    """Let the backbone of a method drop patches in training.

    Args:
        method: Its backbone is changed; the state stays the same.
        rate: Share of the patches to drop at first.

    Raises:
        UserError: The rate is impossible, or the method or its backbone cannot do without patches.
    """
    from ssl_lightning.backbones.vit import AnySizeViT, RotaryViT

    name, backbone = type(method).__name__, method.backbone
    if not 0 < rate < 1:
        raise UserError(f"--model.token_dropout {rate} is a share of the patches; give a number from 0 to below 1.")
    if not method.drops_tokens:
        raise UserError(f"{name} needs all patches of its views; set --model.token_dropout to 0.")
    if not isinstance(backbone, AnySizeViT | RotaryViT):
        raise UserError(
            f"--model.token_dropout drops patches of timm's ViTs, which {method.hparams['backbone']!r} is not; set it "
            "to 0, or --model.backbone to a ViT."
        )
    backbone.patch_drop = TokenDropout(backbone.num_prefix_tokens)  # type: ignore[assignment]
