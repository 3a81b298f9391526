"""Linear classifiers on frozen features, with the papers' exact protocols."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lightning.checkpoints import open_backbone
from ssl_lightning.errors import UserError
from ssl_lightning.evaluation.features import LabelledFeatures, Tokens
from ssl_lightning.evaluation.lowshot import choose
from ssl_lightning.evaluation.supervised import SupervisedModule, named_protocol
from ssl_lightning.optim import Optim


@dataclass(frozen=True)
class LinearProtocol:
    """The settings with which a paper trains its linear classifier.

    Args:
        optim: Optimizer and schedule.
        epochs: Number of epochs.
        batch_size: Images per step over all processes.
        lrs: Base learning rates to try simultaneously. If empty, only the learning rate of ``optim``.
        inputs: Inputs to try, each with each learning rate: the number of last blocks whose class tokens are read, and
            whether the mean of the patch tokens follows (see ``Tokens``).
        batch_norm: Whether BatchNorm without affine parameters normalizes the features.
        zero_init: Whether the weights start at zero, else from a normal distribution with standard deviation 0.01.
        best_on_test: Whether to choose the best classifier on the test images, as DINOv2 does, instead of on held-out
            training images.
    """

    optim: Optim
    epochs: int
    batch_size: int
    lrs: tuple[float, ...] = ()
    inputs: tuple[tuple[int, bool], ...] = ((1, False),)
    batch_norm: bool = False
    zero_init: bool = False
    best_on_test: bool = False

    @property
    def choices(self) -> list[tuple[float, int, bool]]:
        """Learning rate, last blocks and patch mean of each classifier."""
        return [(lr, blocks, mean) for lr in self.lrs or (self.optim.base_lr,) for blocks, mean in self.inputs]

    @property
    def labels(self) -> list[dict[str, Any]]:
        """The choices as rows of a table."""
        one_input = len(self.inputs) == 1
        return [
            {"learning rate": lr, **({} if one_input else {"blocks": blocks, "patch mean": mean})}
            for lr, blocks, mean in self.choices
        ]

    @property
    def last_blocks(self) -> int:
        """Number of last blocks whose class tokens are read by any classifier."""
        return max(blocks for blocks, _ in self.inputs)

    @property
    def patch_mean(self) -> bool:
        """Whether any classifier reads the mean of the patch tokens."""
        return any(mean for _, mean in self.inputs)


def _sgd(base_lr: float, weight_decay: float = 0.0, **changes: Any) -> Optim:
    return Optim("sgd", base_lr, weight_decay=weight_decay, warmup_epochs=0, decay_norm_and_bias=True, **changes)


_DINOV2_LRS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
_MOCO_V2 = _sgd(30.0, lr_scaling="none", milestones=(0.6, 0.8))
_NESTEROV = {"nesterov": True}

LINEAR_PROTOCOLS: dict[str, LinearProtocol] = {
    "sweep": LinearProtocol(_sgd(0.1), 100, 256, lrs=(0.01, 0.03, 0.1, 0.3, 1.0), batch_norm=True),
    "moco_v2": LinearProtocol(_MOCO_V2, 100, 256),
    "moco_v3": LinearProtocol(_sgd(0.1, per_epoch=True), 90, 1024),
    "moco_v3_vit": LinearProtocol(_sgd(3.0, per_epoch=True), 90, 1024),
    "simclr": LinearProtocol(_sgd(0.1, 1e-6, extra=_NESTEROV), 90, 4096, zero_init=True),
    "byol": LinearProtocol(_sgd(0.2, extra=_NESTEROV), 80, 1024),
    "swav": LinearProtocol(_sgd(0.3, 1e-6, per_epoch=True), 100, 256),
    "dino_vit_small": LinearProtocol(_sgd(0.001, per_epoch=True), 100, 1024, inputs=((4, False),)),
    "dino_vit_base": LinearProtocol(_sgd(0.001, per_epoch=True), 100, 1024, inputs=((1, True),)),
    "dinov2": LinearProtocol(
        _sgd(0.1),
        10,
        1024,
        lrs=_DINOV2_LRS,
        inputs=((1, False), (4, False), (1, True), (4, True)),
        best_on_test=True,
    ),
    "mae": LinearProtocol(Optim("lars", 0.1, weight_decay=0.0, warmup_epochs=10), 90, 16384, batch_norm=True),
    "simsiam": LinearProtocol(Optim("larc", 0.1, weight_decay=0.0, warmup_epochs=0, per_epoch=True), 90, 4096),
    "barlow_twins": LinearProtocol(_sgd(0.3, 1e-6, per_epoch=True), 100, 256),
    "vicreg": LinearProtocol(_sgd(0.02, 1e-6, per_epoch=True), 100, 256),
    "lightly": LinearProtocol(_sgd(0.1), 90, 256),
}
"""The papers' protocols, as in their code. ``sweep`` is this package's own, for features of any scale."""


class LinearHeads(nn.Module):
    """Linear classifiers trained together on the same features, for each learning rate and input of a protocol.

    Args:
        protocol: The protocol.
        embed_dim: Width of the features.
        num_classes: Number of classes.
    """

    def __init__(self, protocol: LinearProtocol, embed_dim: int, num_classes: int) -> None:
        super().__init__()
        self.protocol = protocol
        self.heads = nn.ModuleList()
        for _, blocks, mean in protocol.choices:
            linear = nn.Linear(embed_dim * (blocks + mean), num_classes)
            nn.init.zeros_(linear.weight) if protocol.zero_init else nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)
            norm = nn.BatchNorm1d(linear.in_features, affine=False, eps=1e-6) if protocol.batch_norm else nn.Identity()
            self.heads.append(nn.Sequential(norm, linear))

    def forward(self, pieces: Tensor) -> Tensor:
        """Logits ``(H, B, C)`` of all classifiers, for pieces ``(B, P, D)`` from ``Tokens``."""
        tokens = pieces.shape[1] - self.protocol.patch_mean
        logits = []
        for (_, blocks, mean), head in zip(self.protocol.choices, self.heads, strict=True):
            wanted = pieces[:, tokens - blocks : tokens]
            logits.append(head((torch.cat([wanted, pieces[:, -1:]], dim=1) if mean else wanted).flatten(1)))
        return torch.stack(logits)

    def loss(self, pieces: Tensor, labels: Tensor) -> Tensor:
        """Sum over the classifiers of the mean cross-entropy; labels of -1 are ignored."""
        logits = self(pieces)
        return F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)), ignore_index=-1) * len(logits)

    def optimizer(self, global_batch: int) -> torch.optim.Optimizer:
        """One optimizer for all classifiers, each with its learning rate.

        Args:
            global_batch: Images per step over all processes; learning rates scale with it.
        """
        optimizers = [
            replace(self.protocol.optim, base_lr=lr).create(head, global_batch)
            for (lr, _, _), head in zip(self.protocol.choices, self.heads, strict=True)
        ]
        for optimizer in optimizers[1:]:
            for group in optimizer.param_groups:
                optimizers[0].add_param_group(group)
        return optimizers[0]


def fit_heads(
    train: LabelledFeatures, num_classes: int, protocol: LinearProtocol, seed: int, device: torch.device | str = "cpu"
) -> LinearHeads:
    """Train the classifiers of a protocol on features in memory.

    Args:
        train: Features ``(N, P, D)`` and their labels.
        num_classes: Number of classes.
        protocol: The protocol. Its batch size is reduced to N if it is larger.
        seed: Seed of the initial weights and of the order of the data.
        device: Where to train.

    Raises:
        UserError: BatchNorm would see a single image.
    """
    if min(protocol.batch_size, len(train.labels)) < 2 and protocol.batch_norm:
        raise UserError("this protocol's BatchNorm needs 2 images or more in a batch; set --batch_size, or give more.")
    features, labels = train.features.to(device), train.labels.to(device)
    batch_size = min(protocol.batch_size, len(labels))
    steps_per_epoch = len(labels) // batch_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = LinearHeads(protocol, features.shape[2], num_classes).to(device)
    optimizer = heads.optimizer(batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: protocol.optim.lr_factor(step, protocol.epochs * steps_per_epoch, steps_per_epoch),
    )
    random = torch.Generator().manual_seed(seed)
    for _ in range(protocol.epochs):
        order = torch.randperm(len(labels), generator=random).to(device)
        for rows in order[: steps_per_epoch * batch_size].split(batch_size):
            optimizer.zero_grad()
            heads.loss(features[rows], labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return heads.eval()


@torch.no_grad()
def accuracies(heads: LinearHeads, test: LabelledFeatures) -> list[float]:
    """Top-1 accuracy of each classifier, in [0, 1].

    Args:
        heads: The classifiers.
        test: Features ``(M, P, D)`` and their labels.
    """
    device = next(heads.parameters()).device
    predicted = [heads(part.to(device)).argmax(2).cpu() for part in test.features.split(4096)]
    return (torch.cat(predicted, dim=1) == test.labels).double().mean(1).tolist()


def best_head(
    train: LabelledFeatures,
    test: LabelledFeatures,
    num_classes: int,
    protocol: LinearProtocol,
    seed: int,
    device: torch.device | str = "cpu",
) -> tuple[float, list[dict[str, Any]]]:
    """Accuracy of a protocol's best classifier, and the table of all classifiers.

    The best classifier is chosen on a held-out tenth of the training images, and then trained again on all of them. If
    the protocol sets ``best_on_test``, it is chosen on the test images.

    Args:
        train: Features ``(N, P, D)`` and their labels.
        test: Features ``(M, P, D)`` and their labels.
        num_classes: Number of classes.
        protocol: The protocol.
        seed: Seed of the initial weights, of the order of the data and of the held-out images.
        device: Where to train.
    """
    rows = protocol.labels
    if protocol.best_on_test or len(rows) == 1:
        shares = accuracies(fit_heads(train, num_classes, protocol, seed, device), test)
        return max(shares), [{**row, "top-1, %": 100 * share} for row, share in zip(rows, shares, strict=True)]
    held_out = torch.zeros(len(train.labels), dtype=torch.bool)
    held_out[torch.from_numpy(choose(train.labels.numpy(), 0.1, seed))] = True
    if (left := int((~held_out).sum())) < 2:
        raise UserError(
            f"{len(held_out)} training images leave {left} to train on where some are held out to choose among "
            f"{len(rows)} classifiers; give --lrs one number, or more images."
        )
    part, rest = (LabelledFeatures(train.features[some], train.labels[some]) for some in (~held_out, held_out))
    shares = accuracies(fit_heads(part, num_classes, protocol, seed, device), rest)
    rows = [{**row, "held out, %": 100 * share} for row, share in zip(rows, shares, strict=True)]
    best = max(range(len(shares)), key=shares.__getitem__)
    lr, blocks, mean = protocol.choices[best]
    chosen = replace(protocol, lrs=(lr,), inputs=((blocks, mean),))
    top1 = accuracies(fit_heads(train, num_classes, chosen, seed, device), test)[0]
    rows[best]["top-1, %"] = 100 * top1
    return top1, rows


class LinearClassifier(SupervisedModule):
    """Linear classifier on a frozen backbone, trained on augmented images: the papers' linear evaluation.

    The backbone stays in eval mode, and its weights and statistics do not change. Logs ``val/top1`` and ``val/top5`` of
    the best classifier on the validation images, if the protocol tries several, as DINOv2 does.

    Args:
        checkpoint: The backbone: a checkpoint, the name of a model, ``untrained`` or ``pixels``; see ``open_backbone``.
        backbone: Name of the timm or torchvision model, if the checkpoint does not name it.
        backbone_kwargs: Arguments for building the backbone.
        protocol: A key of ``LINEAR_PROTOCOLS``, or a protocol.
        branch: Which network of the checkpoint to read, by a part of its name; None reads the one that is evaluated.
    """

    views = "linear"

    def __init__(
        self,
        checkpoint: str,
        backbone: str | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        protocol: str | LinearProtocol = "sweep",
        branch: str | None = None,
    ) -> None:
        super().__init__()
        self.protocol = named_protocol(LINEAR_PROTOCOLS, protocol) if isinstance(protocol, str) else protocol
        pretrained = open_backbone(checkpoint, backbone, backbone_kwargs, branch)
        self.image_transform, self.embed_dim = pretrained.image_transform, pretrained.embed_dim
        self.tokens = Tokens(pretrained.backbone, self.protocol.last_blocks, self.protocol.patch_mean)
        self.tokens.requires_grad_(False)
        self.optim = self.protocol.optim

    def build(self, num_classes: int) -> int:
        """Build the classifiers."""
        self.heads = LinearHeads(self.protocol, self.embed_dim, num_classes)
        return len(self.heads.heads)

    def train(self, mode: bool = True) -> "LinearClassifier":
        """Set the training mode. The frozen backbone stays in eval mode."""
        super().train(mode)
        self.tokens.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(H, B, C)`` of all classifiers, for images ``(B, 3, S, S)``."""
        return self.heads(self._pieces(images))

    def training_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Sum of the classifiers' cross-entropies."""
        return self.heads.loss(self._pieces(images), labels)

    @torch.no_grad()
    def _pieces(self, images: Tensor) -> Tensor:
        return self.tokens(images).float()

    def optimizer(self, global_batch: int) -> torch.optim.Optimizer:
        """One optimizer for all classifiers."""
        return self.heads.optimizer(global_batch)
