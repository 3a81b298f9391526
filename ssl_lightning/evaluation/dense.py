"""What segmentation and detection share: a pretrained backbone that gives maps, below a head for the data's classes."""

from dataclasses import asdict
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from ssl_lightning.backbones.tokens import as_map
from ssl_lightning.checkpoints import open_backbone, settle_progress
from ssl_lightning.errors import UserError
from ssl_lightning.optim import Optim


class DenseTask(L.LightningModule):
    """Base of the dense tasks: subclasses write ``build``, and call ``configure_model`` when they can.

    Args:
        checkpoint: What to transfer: a checkpoint, the name of a model for its library's weights, or ``untrained``.
        backbone: Name of the timm or torchvision model, for ``untrained`` and checkpoints that do not tell it.
        backbone_kwargs: Arguments of its builder, e.g. ``{img_size: 96}``.
        num_classes: Number of classes; None is that of the data module.
        frozen: Whether the backbone stays as it is, in eval mode.
        optim: Optimizer and learning-rate schedule.
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
    ) -> None:
        super().__init__()
        self.optim = Optim(**optim) if isinstance(optim, dict) else optim  # a checkpoint holds a dict
        self.save_hyperparameters(ignore=["optim"])
        self.save_hyperparameters({"optim": asdict(self.optim)})
        self.pretrained = open_backbone(checkpoint, backbone, backbone_kwargs)
        self.pretrained.backbone.requires_grad_(not frozen)
        self.num_classes, self.frozen, self._built = num_classes, frozen, False
        for name in ("mean", "std"):
            value = torch.tensor(self.pretrained.image_transform[name])
            self.register_buffer(name, value[:, None, None])  # (3, 1, 1)

    def build(self, num_classes: int) -> None:
        """Build what depends on the number of classes.

        Args:
            num_classes: Number of classes of the data.
        """
        raise NotImplementedError(f"{type(self).__name__} must define build(num_classes)")

    @property
    def body(self) -> nn.Module:
        """The pretrained part."""
        raise NotImplementedError(f"{type(self).__name__} must define body")

    def configure_model(self) -> None:
        """Build once the number of classes is known, and compare it with the data's."""
        trainer: Any = self._trainer
        found = None if trainer is None else getattr(trainer.datamodule, "num_classes", None)
        self.num_classes = found if self.num_classes is None else self.num_classes
        if self.num_classes is None:
            if trainer is None:  # it will be known when training begins
                return
            raise UserError("the data does not tell its number of classes; set model.num_classes.")
        if found is not None and found > self.num_classes:
            raise UserError(f"the data has {found} classes, but model.num_classes is {self.num_classes}; leave it out.")
        if not self._built:
            self.build(self.num_classes)
            self._built = True
            self.train()  # a loaded backbone is in eval mode, and the trainer leaves modes as they are

    def train(self, mode: bool = True) -> "DenseTask":
        """A frozen backbone stays in eval mode.

        Args:
            mode: Whether the other parts train.
        """
        super().train(mode)
        if self.frozen:
            self.body.eval()
        return self

    def prepared(self, images: Tensor) -> Tensor:
        """Images as the backbone wants them.

        Args:
            images: ``(..., 3, H, W)``, uint8 or in [0, 1].
        """
        scaled = images.to(self.mean.dtype) / 255 if images.dtype == torch.uint8 else images
        return (scaled - self.mean) / self.std

    def configure_optimizers(self) -> Any:
        """Optimizer and schedule of ``self.optim``."""
        return self.optim.configure(self)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Move the weight decay, where it follows a schedule."""
        self.optim.set_weight_decay(optimizer, self.global_step / self.trainer.estimated_stepping_batches)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what builds the same network again, without the file that was transferred."""
        told = {"checkpoint": "untrained", "backbone": self.pretrained.name, "num_classes": self.num_classes}
        checkpoint["hyper_parameters"] |= {**told, "backbone_kwargs": self.pretrained.backbone_kwargs}
        checkpoint["rows_first"] = getattr(self.pretrained.backbone, "rows_first", None)
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            settle_progress(checkpoint["loops"]["fit_loop"], self.trainer.fit_loop)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore which positions of a ViT are fixed: no weight tells."""
        self.pretrained.backbone.rows_first = checkpoint["rows_first"]


class PatchMap(nn.Module):
    """The patch tokens of a ViT's last block, after its final norm, as a map.

    Args:
        vit: A ViT of timm.
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
                "data.image_size to a multiple."
            )
        tokens = self.vit.fc_norm(
            self.vit.forward_features(images)
        )  # a norm in ViTs that average patches, else nothing
        return {"0": as_map(self.vit, tokens, images)}


def stages(backbone: nn.Module, name: str, first: int) -> nn.Module:
    """The part of a backbone that gives maps: of a ResNet its last stages, of a ViT its patches.

    Args:
        backbone: The backbone.
        name: What to call it.
        first: First stage of a ResNet to give, 1 to 4.

    Returns:
        A module that maps images to ``{"0": map, "1": map, ...}``, each smaller than the one before.

    Raises:
        UserError: It is neither.
    """
    import timm.models.resnet  # only here: reading help texts should not wait for timm
    import torchvision.models.resnet
    from torchvision.models._utils import IntermediateLayerGetter

    from ssl_lightning.backbones.vit import AnySizeViT

    if isinstance(backbone, AnySizeViT):
        return PatchMap(backbone)
    if isinstance(backbone, timm.models.resnet.ResNet | torchvision.models.resnet.ResNet):
        return IntermediateLayerGetter(backbone, {f"layer{first + i}": str(i) for i in range(5 - first)})
    raise UserError(f"backbone {name!r} gives no maps here; take a ResNet of timm or torchvision, or a ViT of timm.")
