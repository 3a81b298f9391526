"""ImageTokenizer: what BEiT predicts."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lightning import losses
from ssl_lightning.backbones.own import Backbone, name_of
from ssl_lightning.backbones.tokens import as_map, only_size
from ssl_lightning.distributed import rank, reduced, world_size
from ssl_lightning.errors import UserError
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.optim import Optim


class ImageTokenizer(SSLModule):
    """Tokenizer of images for BEiT: an autoencoder whose code is one of K vectors for each place of a grid.

    van den Oord et al. 2017, Neural Discrete Representation Learning, https://arxiv.org/abs/1711.00937, with vectors of
    unit norm, which keeps more of them in use: Yu et al. 2022, https://arxiv.org/abs/2110.04627, and unused vectors
    restarted at codes: Dhariwal et al. 2020, Jukebox, https://arxiv.org/abs/2005.00341. It takes the place of the
    discrete variational autoencoder that BEiT borrows from DALL-E, whose weights are not free to share.

    Train it, and give its checkpoint to ``BEiT`` as ``tokenizer``.

    Args:
        num_tokens: Number of vectors K.
        token_dim: Width of the vectors.
        decoder_dim: Width of the decoder.
        commitment: Weight of the distance that draws the encoder to its vectors.
        restart_below: A vector that is chosen less often than this share of the mean, averaged over some 20 steps,
            restarts as a code of the batch; 0 for never.
        probe_every: The probes get features of whole views once every this many steps.
        backbone: Name of the encoder, a network of timm; its stride is the side of the grid's cells.
        optim: Optimizer and learning-rate schedule.
        kwargs: See SSLModule.
    """

    views = "beit"
    remedies = "fewer vectors or a smaller token_dim, a lower learning rate"
    global_views = 1
    shardable = False  # unused vectors are restarted

    def __init__(
        self,
        num_tokens: int = 8192,
        token_dim: int = 32,
        decoder_dim: int = 256,
        commitment: float = 0.25,
        restart_below: float = 0.1,
        probe_every: int = 32,
        backbone: Backbone = "resnet18_cifar",
        optim: Optim = Optim("adamw", base_lr=5e-4, weight_decay=0.05, warmup_epochs=1),
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone=backbone, optim=optim, **kwargs)
        if not hasattr(self.backbone, "forward_features"):
            raise UserError(
                f"backbone={name_of(backbone)!r} gives no feature map; set --model.backbone to a model of timm, or to "
                "one of your own that gives a map (B, D, h, w)."
            )
        self.num_tokens, self.commitment, self.probe_every = num_tokens, commitment, probe_every
        self.restart_below = restart_below
        side = only_size(self.backbone) or 4 * getattr(self.backbone, "patch_side", 16)
        self.stride = side // self.eval()._map(torch.zeros(1, self.in_chans, side, side)).shape[-1]
        """Side of the square in pixels that a token is about."""
        self.train()
        self.projector = nn.Conv2d(self.embed_dim, token_dim, kernel_size=1)
        self.prototypes = nn.Parameter(F.normalize(torch.randn(num_tokens, token_dim), dim=1))
        self.usage: Tensor
        self.register_buffer("usage", torch.full((num_tokens,), 1 / num_tokens))  # share of the words
        self.decoder = nn.Sequential(
            nn.Conv2d(token_dim, decoder_dim, kernel_size=3, padding=1),
            nn.GELU(),
            nn.Conv2d(decoder_dim, decoder_dim, kernel_size=3, padding=1),
            nn.GELU(),
            nn.Conv2d(decoder_dim, self.stride**2 * self.in_chans, kernel_size=1),
            nn.PixelShuffle(self.stride),
        )

    def training_loss(self, views: Sequence[Tensor]) -> Tensor:
        """Error of the reconstruction, and distances of codes and vectors (eq. 3)."""
        images = views[0]
        codes, vectors, ids = self._encoded(images)
        self.defer(counts=self._counts(ids), codes=self._drawn(codes.detach()))
        straight = codes + (vectors - codes).detach()  # the gradient skips the choice
        return losses.vector_quantization(self.decoder(straight), images, codes, vectors, self.commitment)

    def _map(self, images: Tensor) -> Tensor:
        """Features ``(B, embed_dim, rows, columns)``."""
        encoder: Any = self.backbone
        return as_map(encoder, encoder.forward_features(images), images)

    def _encoded(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes and the vectors nearest to them, ``(B, token_dim, rows, columns)``, and these vectors' numbers."""
        codes = F.normalize(self.projector(self._map(images)), dim=1)
        vectors = F.normalize(self.prototypes, dim=1)  # (K, token_dim)
        ids = torch.einsum("bdhw,kd->bhwk", codes, vectors).argmax(3)  # (B, rows, columns)
        return codes, vectors[ids].permute(0, 3, 1, 2), ids

    def _counts(self, ids: Tensor) -> Tensor:
        """How often each vector is chosen on this process: ``(K,)``."""
        chosen = ids.flatten()
        return torch.zeros_like(self.usage).index_add_(0, chosen, self.usage.new_ones(len(chosen)))

    def _drawn(self, codes: Tensor) -> Tensor:
        """A code of the global batch for each vector, ``(K, token_dim)``; 0 where another process has it."""
        places = codes.permute(0, 2, 3, 1).flatten(0, 2)  # (B * N, token_dim), image by image
        drawn = torch.randint(len(places) * world_size(), (self.num_tokens,), generator=self.generator)
        local = drawn - rank() * len(places)
        own = self.random_to_device((local >= 0) & (local < len(places)))
        local = self.random_to_device(local.clamp(0, len(places) - 1))
        return (places[local] * own[:, None]).to(self.usage.dtype)

    @torch.no_grad()
    def update_teacher(self) -> None:
        """Restart vectors that are hardly ever chosen as codes of the batch."""
        if batches := self.deferred("counts"):
            counts, codes = reduced(torch.stack(batches).sum(0)), reduced(self.deferred("codes")[-1])
            self.usage.lerp_(counts / counts.sum(), 0.05)
            unused = self.usage < self.restart_below / self.num_tokens
            self.prototypes.copy_(torch.where(unused[:, None], codes, self.prototypes))
            self.usage.masked_fill_(unused, 1 / self.num_tokens)

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """Numbers ``(B, N)`` of the vectors, row by row.

        Args:
            images: ``(B, 3, S, S)``, normalized as in training.
        """
        return self._encoded(images)[2].flatten(1)

    def check(self, sizes: list[int], global_batch: int) -> None:
        """Views must be a whole number of cells."""
        super().check(sizes, global_batch)
        if sizes[0] % self.stride:
            raise UserError(
                f"the backbone's stride of {self.stride} px does not divide views of {sizes[0]} px; set "
                "--data.image_size."
            )

    def pictures(self, images: Tensor) -> dict[str, Tensor]:
        """The images as the decoder makes them from their words only."""
        _, vectors, _ = self._encoded(images)
        return {"reconstructed": self.decoder(vectors).to(images.dtype)}

    def health(self, views: Sequence[Tensor]) -> dict[str, Tensor | float]:
        """Squared error of the reconstruction, and the share of the vectors in use, of as many as there can be."""
        _, vectors, ids = self._encoded(views[0])
        used = ids.unique().numel() / min(ids.numel(), self.num_tokens)
        return {"reconstruction_error": F.mse_loss(self.decoder(vectors), views[0]), "prototypes_in_use": used}
