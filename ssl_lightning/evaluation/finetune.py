"""Fine-tuning of the whole network, on all labels or a fraction of them."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lightning.backbones.names import create_backbone, is_dinov3, is_vit
from ssl_lightning.checkpoints import Pretrained, open_backbone
from ssl_lightning.errors import UserError
from ssl_lightning.evaluation.supervised import SupervisedModule, named_protocol
from ssl_lightning.optim import Optim
from ssl_lightning.seeding import generators_put_back


@dataclass(frozen=True)
class FineTuneProtocol:
    """The settings with which a paper fine-tunes.

    Args:
        optim: Optimizer and schedule.
        epochs: Number of epochs.
        head_lr: Base learning rate of the classifier. None takes the learning rate from ``optim``.
        zero_init: Whether the classifier's weights start at zero, else from a normal distribution with standard
            deviation 2e-5.
        layer_decay: Each layer of a timm model has this fraction of the learning rate of the layer above it.
        patch_mean: Whether the classifier reads the mean of a ViT's patch tokens, with a new norm, instead of the class
            token.
        drop_path: Rate of stochastic depth.
        rand_augment: Whether to apply RandAugment to the images.
        mixup: Strength of Mixup; 0 turns it off.
        cutmix: Strength of CutMix; 0 turns it off.
        erase: Probability of random erasing.
        label_smoothing: Fraction of the target that is spread over all classes.
    """

    optim: Optim
    epochs: int
    head_lr: float | None = None
    zero_init: bool = False
    layer_decay: float = 1.0
    patch_mean: bool = False
    drop_path: float = 0.0
    rand_augment: bool = False
    mixup: float = 0.0
    cutmix: float = 0.0
    erase: float = 0.0
    label_smoothing: float = 0.0


def _semi(base_lr: float, head_lr: float, **schedule: Any) -> FineTuneProtocol:
    """Fine-tuning on a fraction of the labels: SGD for 20 epochs at batch size 256, without weight decay."""
    optim = Optim("sgd", base_lr, lr_scaling="linear", weight_decay=0.0, warmup_epochs=0, **schedule)
    return FineTuneProtocol(optim, 20, head_lr)


def _mae(base_lr: float, layer_decay: float, drop_path: float, epochs: int) -> FineTuneProtocol:
    optim = Optim("adamw", base_lr, weight_decay=0.05, warmup_epochs=5, end_lr_factor=1e-6 / (4 * base_lr))
    return FineTuneProtocol(
        optim,
        epochs,
        layer_decay=layer_decay,
        patch_mean=True,
        drop_path=drop_path,
        rand_augment=True,
        mixup=0.8,
        cutmix=1.0,
        erase=0.25,
        label_smoothing=0.1,
    )


_SIMCLR = Optim("lars", 0.005, lr_scaling="sqrt", weight_decay=0.0, warmup_epochs=0)
_SWAV_STEPS = {"milestones": (0.6, 0.8), "step_factor": 0.2}

FINETUNE_PROTOCOLS: dict[str, FineTuneProtocol] = {
    "mae_vit_base": _mae(5e-4, 0.65, 0.1, 100),
    "mae_vit_large": _mae(1e-3, 0.75, 0.2, 50),
    "mae_vit_huge": _mae(1e-3, 0.75, 0.3, 50),
    "simclr_1percent": FineTuneProtocol(_SIMCLR, 60, zero_init=True),
    "simclr_10percent": FineTuneProtocol(_SIMCLR, 30, zero_init=True),
    "swav_1percent": _semi(0.02, 5.0, **_SWAV_STEPS),
    "swav_10percent": _semi(0.01, 0.2, **_SWAV_STEPS),
    "barlow_twins_1percent": _semi(0.005, 0.5, per_epoch=True),
    "vicreg_1percent": _semi(0.03, 0.08, per_epoch=True),
    "vicreg_10percent": _semi(0.01, 0.1, per_epoch=True),
}
"""The papers' protocols, as in their code. A percentage in a name is the percentage of the labels it is for."""


class FineTune(SupervisedModule):
    """A classifier whose backbone starts from a checkpoint; all weights are trained.

    Args:
        checkpoint: The backbone: a checkpoint, the name of a model, or ``untrained``; see ``open_backbone``.
        backbone: Name of the timm or torchvision model, if the checkpoint does not name it.
        backbone_kwargs: Arguments for building the backbone.
        protocol: A key of ``FINETUNE_PROTOCOLS``, or a protocol.
        branch: Which network of the checkpoint to read, by a part of its name; None reads the one that is evaluated.
    """

    def __init__(
        self,
        checkpoint: str,
        backbone: str | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        protocol: str | FineTuneProtocol = "swav_10percent",
        branch: str | None = None,
    ) -> None:
        super().__init__()
        self.protocol = named_protocol(FINETUNE_PROTOCOLS, protocol) if isinstance(protocol, str) else protocol
        self.optim = self.protocol.optim
        self.views = "finetune" if self.protocol.rand_augment else "linear"
        pretrained = open_backbone(checkpoint, backbone, backbone_kwargs, branch)
        self.image_transform = pretrained.image_transform
        self.backbone = _trainable(pretrained, self.protocol)
        self.embed_dim = pretrained.embed_dim

    def build(self, num_classes: int) -> int:
        """Build the classifier, Mixup and random erasing."""
        from timm.data import Mixup
        from timm.data.random_erasing import RandomErasing

        protocol = self.protocol
        self.head = nn.Linear(self.embed_dim, num_classes)
        nn.init.zeros_(self.head.bias)
        nn.init.zeros_(self.head.weight) if protocol.zero_init else nn.init.trunc_normal_(self.head.weight, std=2e-5)
        self.mixup = None
        if protocol.mixup or protocol.cutmix:
            self.mixup = Mixup(
                protocol.mixup, protocol.cutmix, label_smoothing=protocol.label_smoothing, num_classes=num_classes
            )
        self.erase = RandomErasing(protocol.erase, mode="pixel") if protocol.erase else None
        return 1

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(1, B, C)`` of images ``(B, 3, S, S)``."""
        return self.head(self.backbone(images))[None]

    def training_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, of mixed images with mixed targets if the protocol has Mixup or CutMix."""
        images, labels = images[labels >= 0], labels[labels >= 0]
        smoothing, even = self.protocol.label_smoothing, len(labels) // 2 * 2
        with self._seeded():
            if self.erase is not None:
                self.erase.device = images.device
                images = self.erase(images)
            if self.mixup is not None and even:  # the first image of the batch is mixed with the last, and so on
                images, labels = self.mixup(images[:even].clone(), labels[:even])
                smoothing = 0.0  # Mixup's targets are already smooth
        return F.cross_entropy(self(images)[0], labels, label_smoothing=smoothing)

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """Make timm's random numbers depend only on the seed, the step and the process."""
        seed = np.random.SeedSequence([torch.initial_seed() % 2**63, self.global_step, self.global_rank])
        words = seed.generate_state(3)
        devices = [self.device] if self.device.type == "cuda" else []
        with generators_put_back(), torch.random.fork_rng(devices):
            random.seed(int(words[0]))
            np.random.seed(words[1])  # noqa: NPY002 # timm draws from all three
            torch.manual_seed(int(words[2]))
            yield

    def optimizer(self, global_batch: int) -> torch.optim.Optimizer:
        """AdamW, SGD or LARS with the learning rates of the layers and of the classifier."""
        optim, protocol = self.optim, self.protocol
        head_scale = 1.0 if protocol.head_lr is None else protocol.head_lr / optim.base_lr
        groups = [
            *layer_groups(self.backbone, optim.weight_decay, protocol.layer_decay),
            {"params": [self.head.weight], "weight_decay": optim.weight_decay, "lr_scale": head_scale},
            {"params": [self.head.bias], "weight_decay": 0.0, "lr_scale": head_scale},
        ]
        return optim.build(groups, global_batch)


def layer_groups(backbone: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Groups of parameters whose learning rate falls from the last layer to the first (BEiT, MAE).

    Tensors of one dimension, position embeddings and the class token have no weight decay.

    Args:
        backbone: A model. If it is not from timm, it counts as a single layer.
        weight_decay: Weight decay of the other parameters.
        layer_decay: Each layer has this fraction of the learning rate of the layer above it.
    """
    from timm.optim import param_groups_layer_decay

    timm_model: Any = backbone
    spared = timm_model.no_weight_decay() if hasattr(backbone, "no_weight_decay") else set()
    if hasattr(backbone, "group_matcher"):
        return param_groups_layer_decay(backbone, weight_decay, no_weight_decay_list=spared, layer_decay=layer_decay)
    if layer_decay < 1:
        raise UserError(
            "layer_decay needs a model from timm, which lists its layers; choose a protocol without layer_decay."
        )
    params = [(param.ndim > 1 and name not in spared, param) for name, param in backbone.named_parameters()]
    return [
        {"params": [param for decayed, param in params if decayed], "weight_decay": weight_decay},
        {"params": [param for decayed, param in params if not decayed], "weight_decay": 0.0},
    ]


def _trainable(pretrained: Pretrained, protocol: FineTuneProtocol) -> nn.Module:
    """The backbone with the protocol's stochastic depth, reading the tokens of a ViT that the protocol reads."""
    kwargs = dict(pretrained.backbone_kwargs)
    if not (is_vit(pretrained.name) or is_dinov3(pretrained.name)):
        if protocol.patch_mean:
            raise UserError("this protocol reads the patch tokens of a ViT; choose another protocol for this backbone.")
        return pretrained.backbone.train()
    if protocol.patch_mean:
        kwargs |= {"global_pool": "avg"}
    if protocol.drop_path:
        kwargs |= {"drop_path_rate": protocol.drop_path}
    model = create_backbone(pretrained.name, **kwargs)
    weights = {name: value for name, value in pretrained.backbone.state_dict().items() if name in model.state_dict()}
    new = set(model.load_state_dict(weights, strict=False).missing_keys)
    assert new <= {"fc_norm.weight", "fc_norm.bias"}, new  # the mean of the patches has its own norm
    return model.requires_grad_(True).train()  # Lightning does not change the mode
