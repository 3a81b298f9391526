"""Tools that a method uses within a training step."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from ssl_lightning.distributed import own_part, world_size
from ssl_lightning.features import FeatureRecorder
from ssl_lightning.seeding import StepRandomness
from ssl_lightning.training import HostLosses


class StepTools(L.LightningModule):
    """Progress, random numbers, values deferred to ``update_teacher``, and features for the probes."""

    image_indices: Tensor | None = None
    """Indices ``(B,)`` of the images of the training batch in the data set; None from a loader without them."""

    global_batch: int | None = None
    """Images per batch over all processes; None before the first batch."""

    last_loss: float | None = None
    """Loss of the newest batch, once it is on the host: what the progress bar shows without waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.randomness, self.recorder, self.host_losses = StepRandomness(), FeatureRecorder(), HostLosses()
        self.forget_deferred()

    @property
    def progress(self) -> float:
        """Share of the planned optimizer steps that are done, in [0, 1]; 0 outside a training."""
        return self.progress_of(self.global_step)

    def progress_of(self, step: int) -> float:
        """The progress before a step.

        Args:
            step: Optimizer steps done.
        """
        return 0.0 if self._trainer is None else min(1.0, step / max(1, self.trainer.estimated_stepping_batches))

    @property
    def generator(self) -> torch.Generator:
        """Random numbers of the step, on the CPU: the same on every process and after a resume."""
        return self.randomness.generator or torch.default_generator

    @property
    def train_images(self) -> Any:
        """The training images of the trainer's data module; None for another loader, or a stream."""
        return getattr(getattr(self.trainer, "datamodule", None), "train_images", None)

    def uniform(self, images: int, numbers: int) -> Tensor:
        """Random numbers in [0, 1) for each image, on the CPU; they do not depend on the number of processes.

        Args:
            images: Images of this process.
            numbers: Numbers per image.

        Returns:
            ``(images, numbers)``.
        """
        return own_part(torch.rand(images * world_size(), numbers, generator=self.generator))

    def seeds_of_images(self, images: int) -> list[int]:
        """A seed for each image of this process's batch, the same on any number of processes and after a resume.

        Args:
            images: Images of this process.
        """
        return own_part(torch.randint(2**62, (images * world_size(),), generator=self.generator)).tolist()

    def random_to_device(self, host: Tensor) -> Tensor:
        """Move what ``generator`` drew to the device, without waiting for it.

        Args:
            host: Tensor on the CPU.
        """
        pinned = host.pin_memory() if self.device.type == "cuda" else host
        return pinned.to(self.device, non_blocking=pinned is not host)

    def record(self, features: Tensor) -> None:
        """Hand features of the training images to the probes: for methods that call parts of the evaluated backbone.

        Args:
            features: ``(B, embed_dim)``; rows beyond the images of the batch, e.g. of further views, are ignored.
        """
        self.recorder.record(features)

    def defer(self, **values: Tensor) -> None:
        """Keep values of this batch for ``update_teacher``; values of a skipped step are dropped.

        Args:
            values: Tensors by name.
        """
        if self._deferred_at != self.global_step:
            self.forget_deferred()
        for name, value in values.items():
            self._deferred.setdefault(name, []).append(value)

    def deferred(self, name: str) -> list[Tensor]:
        """Take the values that the batches of this step deferred, in order.

        Args:
            name: As given to ``defer``.
        """
        return self._deferred.pop(name, [])

    def forget_deferred(self) -> None:
        """Drop all deferred values."""
        self._deferred: dict[str, list[Tensor]] = {}
        self._deferred_at = self.global_step
