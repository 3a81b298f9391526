"""Shared by segmentation and detection: a pretrained backbone that gives feature maps, and a head for the classes."""

from dataclasses import asdict
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from ssl_lightning.backbones.tokens import ViT, as_map
from ssl_lightning.checkpoints import open_backbone, settle_progress
from ssl_lightning.errors import UserError
from ssl_lightning.optim import Optim

_LAYOUT = "rows_first", "antialiased"
"""Attributes of a ViT that say how its positions follow the size of images."""


class DenseTask(L.LightningModule):
    """Base of the dense tasks: a subclass writes ``build`` and ``body``, and calls ``configure_model``.

    Args:
        checkpoint: What to transfer: a checkpoint, the name of a model with its library's weights, or ``untrained``.
        backbone: Name of the timm or torchvision model, if ``untrained`` or if the checkpoint does not name it.
        backbone_kwargs: Arguments for building the backbone, e.g. ``{img_size: 96}``.
        num_classes: Number of classes. None takes the number from the data module.
        frozen: Whether the backbone is not trained, and stays in eval mode.
        optim: Optimizer and learning-rate schedule.
        branch: Which network of the checkpoint to read, by a part of its name, e.g. student; None follows the paper.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        checkpoint: str,
        backbone: str | None,
        backbone_kwargs: dict[str, Any] | None,
        num_classes: int | None,
        frozen: bool,
        optim: Optim,
        branch: str | None = None,
    ) -> None:
        super().__init__()
        self.optim = Optim(**optim) if isinstance(optim, dict) else optim  # a checkpoint holds a dict
        self.save_hyperparameters(ignore=["optim"])
        self.save_hyperparameters({"optim": asdict(self.optim)})
        self.pretrained = open_backbone(checkpoint, backbone, backbone_kwargs, branch)
        self.pretrained.backbone.requires_grad_(not frozen)
        self.num_classes, self.frozen, self._built = num_classes, frozen, False
        for name in ("mean", "std"):
            value = torch.tensor(self.pretrained.image_transform[name])
            self.register_buffer(name, value[:, None, None])  # (3, 1, 1)

    def build(self, num_classes: int) -> None:
        """Build the parts that depend on the number of classes.

        Args:
            num_classes: Number of classes of the data.
        """
        raise NotImplementedError(f"{type(self).__name__} must define build(num_classes)")

    @property
    def body(self) -> nn.Module:
        """The pretrained part."""
        raise NotImplementedError(f"{type(self).__name__} must define body")

    def configure_model(self) -> None:
        """Build the head once the number of classes is known, and check the number against the data."""
        trainer: Any = self._trainer
        data_classes = None if trainer is None else getattr(trainer.datamodule, "num_classes", None)
        self.num_classes = data_classes if self.num_classes is None else self.num_classes
        if self.num_classes is None:
            if trainer is None:  # the number will be known when training begins
                return
            raise UserError("the data does not state its number of classes; set --model.num_classes.")
        if data_classes is not None and data_classes > self.num_classes:
            raise UserError(
                f"the data has {data_classes} classes, but --model.num_classes is {self.num_classes}; leave it out."
            )
        if not self._built:
            self.build(self.num_classes)
            self._built = True
            self.train()  # a loaded backbone is in eval mode, and the trainer leaves modes as they are

    def train(self, mode: bool = True) -> "DenseTask":
        """Set the training mode. A frozen backbone stays in eval mode.

        Args:
            mode: Whether the parts that are not frozen train.
        """
        super().train(mode)
        if self.frozen:
            self.body.eval()
        return self

    def prepared(self, images: Tensor) -> Tensor:
        """Images as the backbone expects them, normalized.

        Args:
            images: ``(..., 3, H, W)``, uint8 or in [0, 1].
        """
        scaled = images.to(self.mean.dtype) / 255 if images.dtype == torch.uint8 else images
        return (scaled - self.mean) / self.std

    def configure_optimizers(self) -> Any:
        """Optimizer and schedule of ``self.optim``."""
        return self.optim.configure(self)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the weight decay of this step, if it follows a schedule."""
        self.optim.set_weight_decay(optimizer, self.global_step / self.trainer.estimated_stepping_batches)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the settings that rebuild the same network without the original checkpoint."""
        built: dict[str, Any] = {"backbone": self.pretrained.name, "backbone_kwargs": self.pretrained.backbone_kwargs}
        settings = {"checkpoint": "untrained", "branch": None, "num_classes": self.num_classes}
        checkpoint["hyper_parameters"] |= {**settings, **built}
        for layout in _LAYOUT:
            checkpoint[layout] = getattr(self.pretrained.backbone, layout, None)
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            settle_progress(checkpoint["loops"]["fit_loop"], self.trainer.fit_loop)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the layout of a ViT's positions, which the weights do not show."""
        backbone: Any = self.pretrained.backbone
        backbone.rows_first, backbone.antialiased = (checkpoint.get(layout) for layout in _LAYOUT)


class PatchMap(nn.Module):
    """The patch tokens of a ViT's last block, after its final norm, as a map.

    Args:
        vit: A ViT from timm.
    """

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map ``(B, D, H / P, W / P)`` of images ``(B, 3, H, W)``, as the only level."""
        patch, (height, width) = self.vit.patch_side, images.shape[-2:]
        if height % patch or width % patch:
            raise UserError(
                f"the backbone's patches of {patch} px do not divide images of {width}x{height} px; set "
                "--data.image_size to a multiple."
            )
        # fc_norm is a norm in ViTs that average patches, otherwise the identity
        tokens = self.vit.fc_norm(self.vit.forward_features(images))
        return {"0": as_map(self.vit, tokens, images)}


def stages(backbone: nn.Module, name: str, first: int) -> nn.Module:
    """The part of a backbone that gives feature maps: the last stages of a ResNet, the patch tokens of a ViT.

    Args:
        backbone: The backbone.
        name: Name of the backbone in messages.
        first: First stage of a ResNet to return, 1 to 4.

    Returns:
        A module that maps images to ``{"0": map, "1": map, ...}``, from the largest to the smallest.

    Raises:
        UserError: The backbone is neither a ResNet nor a ViT.
    """
    import timm.models.resnet  # only here: reading help texts should not wait for timm
    import torchvision.models.resnet
    from torchvision.models._utils import IntermediateLayerGetter

    if isinstance(backbone, ViT):
        return PatchMap(backbone)
    if isinstance(backbone, timm.models.resnet.ResNet | torchvision.models.resnet.ResNet):
        return IntermediateLayerGetter(backbone, {f"layer{first + i}": str(i) for i in range(5 - first)})
    raise UserError(
        f"backbone {name!r} gives no feature maps here; choose a ResNet from timm or torchvision, or a ViT from timm."
    )
