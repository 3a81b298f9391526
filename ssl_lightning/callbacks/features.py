"""Features of plain images while a method trains, for probes, monitors and pictures."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn

from ssl_lightning.distributed import gather_uneven


class PlainFeatures(NamedTuple):
    """Features of plain images, the same on every process, in the order of the data."""

    features: Tensor
    """``(N, D)``."""
    labels: Tensor
    """``(N,)``; -1 is unknown."""
    indices: Tensor
    """``(N,)`` indices of the images in the data set."""

    def some(self, count: int) -> "PlainFeatures":
        """At most ``count`` of them, evenly spread, on the CPU."""
        size = len(self.indices)
        rows = torch.arange(min(count, size), device=self.indices.device) * size // max(1, min(count, size))
        return PlainFeatures(*(part[rows].cpu() for part in self))


def plain_features(
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    loader: Iterable[Any],
    reference: tuple[Callable[[Tensor], Tensor], int] | None = None,
) -> PlainFeatures:
    """Features of plain images over all processes.

    Args:
        trainer: Determines device and precision.
        pl_module: The method, in eval mode. Maps images to features.
        loader: Batches of plain images, each image once over all processes.
        reference: Another network, and the width of its features, in place of the method.
    """
    network, width = reference or (pl_module, int(pl_module.embed_dim))  # type: ignore[arg-type]
    features, labels, indices = [no_features(pl_module, width)], [no_numbers(pl_module)], [no_numbers(pl_module)]
    for batch in loader:
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        with trainer.precision_plugin.val_step_context():
            features.append(network(batch.images).float())
        labels.append(batch.labels)
        indices.append(batch.indices)
    gathered = gather_uneven(torch.cat(indices))
    order = gathered.argsort()
    return PlainFeatures(
        gather_uneven(torch.cat(features))[order], gather_uneven(torch.cat(labels))[order], gathered[order]
    )


def no_features(pl_module: Any, width: int | None = None) -> Tensor:
    """Features ``(0, D)`` of no images, so that a process without images can take part in gathering."""
    return torch.empty(0, width or int(pl_module.embed_dim), device=pl_module.device)


def no_numbers(pl_module: L.LightningModule) -> Tensor:
    """Labels or indices ``(0,)`` of no images."""
    return torch.empty(0, dtype=torch.long, device=pl_module.device)


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode, and afterwards restore the mode of each of its parts.

    Args:
        module: The method.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
