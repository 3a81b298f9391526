"""BatchNorm over the images of all processes, on any device."""

from typing import Any

from lightning.pytorch.plugins import TorchSyncBatchNorm
from torch import Tensor, nn

from ssl_lightning.distributed import summed


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm with mean and variance over all processes, with the exact gradient.

    If each process computes its share of the loss and gradients are averaged over processes, everything equals a single
    process that holds the whole batch. Own code because torch's refuses tensors on the CPU; on GPUs torch's is faster.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        """Take any number of dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``(B, C, ...)``."""
        if not self.training:
            return super().forward(x)
        wide = x.float() if x.dtype.itemsize < 4 else x
        axes, shape = [0, *range(2, x.ndim)], (1, -1, *[1] * (x.ndim - 2))
        count = summed(wide.new_full((), x.numel() / x.shape[1]))
        mean = summed(wide.sum(axes)) / count  # (C,)
        centered = wide - mean.view(shape)
        variance = summed(centered.square().sum(axes)) / count  # (C,)
        if self.track_running_stats:
            self._follow(mean.detach(), variance.detach() * (count / (count - 1)))
        scale = (variance + self.eps).rsqrt()
        scale = scale if self.weight is None else scale * self.weight
        out = centered * scale.view(shape)
        return (out if self.bias is None else out + self.bias.view(shape)).to(x.dtype)

    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics as torch does."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


class SyncBatchNormAct(SyncBatchNorm):
    """timm's BatchNormAct2d (BatchNorm, dropout and activation) over all processes."""

    act: nn.Module
    drop: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Normalize and activate ``(B, C, H, W)``."""
        return self.act(self.drop(super().forward(x)))


class SyncedBatchNorm(TorchSyncBatchNorm):
    """Lightning's plugin behind ``trainer.sync_batchnorm``: torch's SyncBatchNorm on GPUs, this file's on CPUs.

    The layers stay the same objects and only change their class. Give it to a Trainer as
    ``Trainer(sync_batchnorm=True, plugins=[SyncedBatchNorm()])``; the command line does so.
    """

    def __init__(self) -> None:
        self._plain: list[tuple[nn.Module, type[nn.Module]]] = []

    def apply(self, model: nn.Module) -> nn.Module:
        """Synchronize all BatchNorm layers of a model.

        Args:
            model: Changed in place.
        """
        from timm.layers import BatchNormAct2d  # only here: reading help texts should not wait for timm
        from timm.layers import SyncBatchNormAct as TorchSyncBatchNormAct

        trainer = getattr(model, "_trainer", None)  # ddp moves the model to its device later
        device = next(model.parameters()).device if trainer is None else trainer.strategy.root_device
        on_cpu = device.type == "cpu"
        kind: type
        plain, activated = (SyncBatchNorm, SyncBatchNormAct) if on_cpu else (nn.SyncBatchNorm, TorchSyncBatchNormAct)
        usual = nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward  # a subclass that computes something else stays
        for module in model.modules():
            layer: Any = module
            if type(layer) is BatchNormAct2d:
                kind = activated
            elif isinstance(layer, nn.modules.batchnorm._BatchNorm) and type(layer).forward in usual:
                kind = plain
            else:
                continue
            self._plain.append((layer, type(layer)))
            layer.__class__ = kind
            layer.process_group = None
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Give all layers their former class.

        Args:
            model: Changed in place.
        """
        for module, kind in self._plain:
            module.__class__ = kind
        self._plain = []
        return model
