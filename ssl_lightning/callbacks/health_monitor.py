"""How healthy the features are while they are learnt, without labels."""

import time
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from ssl_lightning.callbacks.features import in_eval_mode, plain_features
from ssl_lightning.distributed import gather
from ssl_lightning.errors import UserError
from ssl_lightning.evaluation.quality import alignment, alpha_req, feature_std, rankme, uniformity


class HealthMonitor(L.Callback):
    """Logs what features tell without labels: rank, spectrum, spread, alignment, and the method's state.

    ``health/rankme``, ``health/alpha_req``, ``health/feature_std`` and ``health/uniformity`` are those of some training
    images as evaluation prepares them; ``health/alignment`` and ``health/teacher_agreement`` (mean cosine of the
    teacher's and the student's features) those of the last training batch; further ones come from the method's
    ``health``. See ``ssl_lightning.evaluation`` for the formulas. One pass over a small part of the data; its cost is
    printed once.

    Args:
        num_images: Training images that are looked at, evenly spread; None is a 32nd of them, from 64 to 2,048.
        every_n_epochs: Look after every that many epochs.
    """

    def __init__(self, num_images: int | None = None, every_n_epochs: int = 1) -> None:
        if every_n_epochs < 1 or (num_images is not None and num_images < 2):
            raise UserError(
                f"HealthMonitor: num_images={num_images} must be at least 2, every_n_epochs={every_n_epochs} 1."
            )
        self.num_images, self.every_n_epochs = num_images, every_n_epochs
        self.looked_in: int | None = None
        """The last epoch in which it looked."""
        self._views: Sequence[Tensor] = []
        self._epoch_start, self._told = 0.0, False

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock of the epoch."""
        self._epoch_start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the last batch of views."""
        if trainer.is_last_batch:
            self._views = batch[0]

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look, before checkpoints are chosen."""
        self._look(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look, if there was no validation."""
        with in_eval_mode(pl_module):
            self._look(trainer, pl_module)

    def _look(self, trainer: L.Trainer, pl_module: Any) -> None:
        views, self._views = self._views, []
        if not len(views) or (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        start, self.looked_in = time.perf_counter(), trainer.current_epoch
        devices = [pl_module.device] if pl_module.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices), trainer.precision_plugin.val_step_context():
            found = self._of_features(self._features(trainer, pl_module))
            found |= self._of_views(pl_module, views)
        for name, value in found.items():
            pl_module.log(f"health/{name}", value)
        if not self._told:
            self._told = True
            seconds, epoch = time.perf_counter() - start, start - self._epoch_start
            rank_zero_info(f"HealthMonitor took {seconds:.2f} s, {seconds / epoch:.1%} of the epoch.")

    def _features(self, trainer: L.Trainer, pl_module: Any) -> Tensor:
        """Features ``(N, D)`` of the images that are looked at, those of all processes."""
        data: Any = getattr(trainer, "datamodule", None)
        loader = data.plain_dataloader(self.num_images) if hasattr(data, "plain_dataloader") else []
        return plain_features(trainer, pl_module, loader).features

    def _of_features(self, features: Tensor) -> dict[str, float]:
        if len(features) < 2:
            return {}
        found = {"rankme": rankme(features), "feature_std": feature_std(features), "uniformity": uniformity(features)}
        try:
            return {**found, "alpha_req": alpha_req(features)}
        except UserError:  # too few directions to fit, as when features collapse
            return found

    def _of_views(self, pl_module: Any, views: Sequence[Tensor]) -> dict[str, float]:
        found: dict[str, float] = {}
        same = [view for view in views[:2] if view.shape == views[0].shape]
        features = [pl_module(view).float() for view in same]
        if len(features) == 2:
            found["alignment"] = alignment(*(gather(one) for one in features))
        if hasattr(pl_module, "teacher_backbone"):
            student, teacher = (part(views[0]).float() for part in (pl_module.backbone, pl_module.teacher_backbone))
            found["teacher_agreement"] = float(gather(F.cosine_similarity(student, teacher)).mean())
        own = pl_module.health(views) if hasattr(pl_module, "health") else {}
        return found | {name: float(gather(torch.as_tensor(value)[None]).float().mean()) for name, value in own.items()}
