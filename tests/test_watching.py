"""What watches a training and judges features without labels: the same online and by command, and seldom enough."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from ssl_lightning import ArrayData, DigitsData, Evaluation, HealthMonitor, KNNProbe, UserError, ViewSpec
from ssl_lightning.callbacks.awaited_metrics import AwaitedMetrics
from ssl_lightning.callbacks.checkpoint import LastCheckpoint
from ssl_lightning.callbacks.interval import Interval
from ssl_lightning.checkpoints import open_backbone
from ssl_lightning.evaluation import lidar, rankme
from ssl_lightning.evaluation.clusters import cluster_measures
from tests.small import BACKBONE, digits, simclr, trainer

CPU = {"accelerator": "cpu"}


# Clusters and quality


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, float]]:
    """The checkpoint of a short training, and what was measured at its end."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    running = trainer(folder, max_epochs=2, callbacks=[KNNProbe()])
    running.fit(simclr(), digits())
    running.save_checkpoint(folder / "x.ckpt")
    return str(folder / "x.ckpt"), {name: float(value) for name, value in running.callback_metrics.items()}


def test_separate_clusters_are_recovered_and_collapse_is_seen() -> None:
    random = torch.Generator().manual_seed(0)
    classes = torch.arange(90) % 3
    features = 5 * torch.eye(3, 8)[classes] + 0.1 * torch.randn(90, 8, generator=random)
    labels = torch.where(torch.arange(90) < 30, -1, classes)
    found = cluster_measures(features, labels, 3)
    assert (found["cluster_accuracy"], found["nmi"]) == pytest.approx((1, 1))
    assert found["silhouette"] > 0.9
    assert cluster_measures(features, torch.full((90,), -1), 3) == {"silhouette": found["silhouette"]}
    assert cluster_measures(features[:1].expand(90, 8), classes, 3)["silhouette"] == 0
    assert math.isnan(cluster_measures(features.log(), classes, 3)["nmi"])


def test_clusters_of_the_command_are_those_of_the_probe(run: tuple[str, Any], tmp_path: Path) -> None:
    found = Evaluation(run[0], DigitsData(), output=str(tmp_path), trainer=CPU).clusters()
    assert found is not None
    for name in ("cluster_accuracy", "nmi", "silhouette"):
        assert found.measures[name] == pytest.approx(run[1][f"val/{name}"], abs=1e-6)
    assert "cluster_accuracy 0." in found.headline
    assert (found.data["train_images"], found.data["test_images"]) == (0, 360)


def test_images_without_labels_are_clustered_by_the_silhouette(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(256, size=(60, 3, 16, 16), dtype=np.uint8)
    data = ArrayData(images, val_fraction=0, batch_size=16, num_workers=0)
    evaluation = Evaluation("untrained", data, **BACKBONE, output=str(tmp_path), trainer=CPU)
    found = evaluation.clusters()
    assert found is not None
    assert [row["clusters"] for row in found.rows] == [5, 10, 20]
    assert found.measures == {"silhouette": max(row["silhouette"] for row in found.rows)}
    assert "60 training images\n" in str(found)
    with pytest.raises(UserError, match=r"--clusters \[61\] must lie between 2 and 60"):
        evaluation.clusters(61)
    assert "lidar" in str(evaluation.quality(num_images=20, num_views=2))
    running = trainer(tmp_path, callbacks=[HealthMonitor(num_images=20)])
    running.fit(simclr(), data)
    assert -1 <= float(running.callback_metrics["health/silhouette"]) <= 1


def test_lidar_is_of_the_views_that_training_makes(
    run: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_LIGHTNING_CACHE", str(tmp_path))
    arguments: dict[str, Any] = {"num_images": 40, "num_views": 3}
    first, again = (
        Evaluation(run[0], digits(train_samples=80), output=str(tmp_path), trainer=CPU).quality(**arguments)
        for _ in range(2)
    )
    assert first is not None
    assert again is not None
    assert first.rows == again.rows  # from the cache
    backbone, views = open_backbone(run[0]).backbone, torch.zeros(80, 4, 16)
    data = digits(train_samples=80, batch_size=20)
    for epoch in (0, 1):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        for raw in loader:
            batch = data.on_after_batch_transfer(raw, 0)
            with torch.no_grad():
                features = torch.stack([backbone(view) for view in batch.views], dim=1)
            views[batch.indices, 2 * epoch : 2 * epoch + 2] = features
    assert first.measures["lidar"] == pytest.approx(lidar(views[::2, :3]), rel=1e-3)
    assert first.measures["rankme"] == pytest.approx(rankme(plain(backbone, data)), rel=1e-3)


def plain(backbone: Any, data: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([backbone(data.on_after_batch_transfer(b, 0).images) for b in data.plain_dataloader(80)])


# Intervals


def due_epochs(
    looked_at: int, epochs: int, multiple_of: int = 1, view_cost: float = 3, **running: Any
) -> tuple[int, list[int]]:
    """The interval, and the epochs in which it comes, with 60,000 passes an epoch: 10,000 images, each twice."""
    spec = ViewSpec(size=32, count=2)
    data = SimpleNamespace(view_specs=(spec,), image_size=32, batch_size=100, train_images=[])
    running["lightning_module"] = SimpleNamespace(view_cost=view_cost)
    running = {"world_size": 2, "num_training_batches": 50, **running}
    trainer: Any = SimpleNamespace(datamodule=data, max_epochs=epochs, max_steps=-1, current_epoch=0, **running)
    interval = Interval("auto", "--x", 0.02)
    interval.plan(trainer, looked_at, multiple_of)
    due = []
    for trainer.current_epoch in range(epochs if epochs > 0 else 30):
        due += [trainer.current_epoch + 1] if interval.is_due(trainer) else []
    return interval.epochs, due


def test_an_interval_keeps_to_its_share_of_the_training() -> None:
    assert due_epochs(600, 4) == (1, [1, 2, 3, 4])
    assert due_epochs(12_000, 14) == (14, [1, 14])  # always the first and the last
    interval, due = due_epochs(12_000, 100)
    assert (interval, due) == (12, [1, 12, 24, 36, 48, 60, 72, 84, 96, 100])
    assert 12_000 * len(due) <= 0.02 * 60_000 * 100
    assert due_epochs(12_000, 100, multiple_of=5)[0] == 15
    assert due_epochs(12_000, 100, view_cost=1.5)[0] == 25
    assert due_epochs(12_000, -1) == (10, [1, 10, 20, 30])  # without an end
    assert due_epochs(12_000, 100, world_size=1, num_training_batches=100)[0] == 12  # processes make no difference


class Epochs(L.Callback):
    """Notes in which epochs there were which metrics."""

    def __init__(self) -> None:
        self.metrics: list[set[str]] = []

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        trainer.callback_metrics.clear()

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        self.metrics.append({"val/knn_top1", "health/rankme"} & trainer.callback_metrics.keys())


class StoppedError(Exception):
    """Ends a training."""


class StopAfter(L.Callback):
    """Ends a training once an epoch is over and saved."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == self.epoch:
            raise StoppedError


def trained(
    folder: Path, every: Any, epochs: int = 4, stop_after: int = -1, **kwargs: Any
) -> tuple[list[set[str]], dict[str, Any], Any]:
    L.seed_everything(0, verbose=False)
    module, noted = simclr(), Epochs()
    probes = [KNNProbe(every_n_epochs=every), HealthMonitor(every_n_epochs=every)]
    callbacks = [*probes, noted, LastCheckpoint(dirpath=str(folder)), StopAfter(stop_after)]
    running = trainer(folder, max_epochs=epochs, callbacks=callbacks, limit_train_batches=2, enable_checkpointing=True)
    running.fit(module, digits(), **kwargs)
    return noted.metrics, module.state_dict(), running


def test_auto_skips_epochs_changes_no_weight_and_goes_on_after_a_resume(tmp_path: Path) -> None:
    both: set[str] = {"val/knn_top1", "health/rankme"}
    _, weights, _ = trained(tmp_path / "1", 1)
    metrics, thinned, running = trained(tmp_path / "auto", "auto")
    assert metrics == [both, set(), set(), both]
    assert running.check_val_every_n_epoch == 1
    assert all(torch.equal(value, thinned[name]) for name, value in weights.items())
    with pytest.raises(StoppedError):
        trained(tmp_path / "cut", "auto", stop_after=2)
    resumed, _, _ = trained(tmp_path / "cut", "auto", ckpt_path=tmp_path / "cut/last.ckpt", weights_only=False)
    assert resumed == metrics[2:]


def test_early_stopping_waits_for_epochs_that_measure(tmp_path: Path) -> None:
    stop = EarlyStopping("val/knn_top1", patience=1, mode="max", min_delta=1.0)
    running = trainer(tmp_path, max_epochs=5, callbacks=[KNNProbe(), stop, AwaitedMetrics()], limit_train_batches=2)
    running.fit(simclr(), digits())
    assert running.current_epoch == 5
    assert stop.stopped_epoch == 4, "the first and the last epoch are measured, and the last is no better"
    with pytest.raises(UserError, match=r"--knn_probe.every_n_epochs=0 must be at least 1, or auto"):
        KNNProbe(every_n_epochs=0)


def test_a_metric_that_never_comes_is_refused_after_the_first_epoch(tmp_path: Path) -> None:
    stop = EarlyStopping("val/knn_top", mode="max")
    running = trainer(tmp_path, max_epochs=5, callbacks=[KNNProbe(), stop, AwaitedMetrics()], limit_train_batches=2)
    with pytest.raises(UserError, match="val/knn_top1"):
        running.fit(simclr(), digits())
    assert running.current_epoch == 0
