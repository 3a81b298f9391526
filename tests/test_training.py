"""Training: learning, resuming, probes that change nothing, and what stops a run."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from ssl_lightning import FakeData, KNNProbe, LastCheckpoint, LinearProbe, Optim, SSLModule, Throughput, UserError
from ssl_lightning.evaluation import knn_predict
from tests.small import BACKBONE, Endless, digits, simclr, slow_unless, trainer


class Recorder(L.Callback):
    """Keeps what was logged after each validation, and the indices of each training batch."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.batches: list[list[int]] = []
        self.lrs: list[float] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append(batch.indices.tolist())
        self.lrs.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.metrics.append({key: float(value) for key, value in trainer.callback_metrics.items()})


@pytest.mark.slow
def test_simclr_learns_digits_and_the_probes_see_it(tmp_path: Path) -> None:
    L.seed_everything(0)
    recorder = Recorder()
    running = trainer(tmp_path, max_epochs=5, callbacks=[LinearProbe(), KNNProbe(every_n_epochs=1), recorder])
    optim = Optim("adamw", base_lr=3e-3, lr_scaling="none", warmup_epochs=1)
    method = simclr(temperature=0.2, optim=optim, backbone_kwargs={"channels": (16, 16, 32, 64)})
    running.fit(method, digits(batch_size=64))
    assert len(recorder.metrics) == 5
    first, last = recorder.metrics[0], recorder.metrics[-1]
    assert last["train/loss"] < first["train/loss"] - 0.5
    assert last["val/knn_top1"] > 0.8
    assert last["val/linear_top1"] > first["val/linear_top1"] + 0.1
    assert last["val/linear_top5"] > last["val/linear_top1"]


def trained(folder: Path, callbacks: list[L.Callback], **kwargs: Any) -> dict[str, Tensor]:
    L.seed_everything(1)
    method = simclr()
    trainer(folder, max_epochs=2, callbacks=callbacks, **kwargs).fit(method, digits())
    return {name: value.clone() for name, value in method.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.slow
def test_probes_change_no_weight_of_the_method(tmp_path: Path) -> None:
    with_probes = trained(tmp_path, [LinearProbe(), KNNProbe()])
    assert equal(with_probes, trained(tmp_path, []))
    assert not any("probe" in name or "head" in name for name in with_probes)


class Stop(L.Callback):
    """Ends training as a lost machine does: at once."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(  # within the first epoch, at its end, within the second
    ("stop", "num_workers"),
    slow_unless(lambda *case: case == (17, 2), [(4, 0), (4, 2), (11, 0), (11, 2), (17, 0), (17, 2)]),
)
def test_a_resumed_run_ends_bit_for_bit_as_the_uninterrupted(tmp_path: Path, stop: int, num_workers: int) -> None:
    def run(folder: Path, ckpt_path: str | None, extra: list[L.Callback]) -> tuple[dict[str, Tensor], Recorder, Any]:
        L.seed_everything(1)
        method, recorder, probe = simclr(optim=Optim("lars", warmup_epochs=1)), Recorder(), LinearProbe()
        callbacks = [probe, KNNProbe(), recorder, Throughput(), *extra]
        running = trainer(folder, max_epochs=2, callbacks=callbacks, enable_checkpointing=True)
        with suppress(KeyboardInterrupt, SystemExit):
            running.fit(method, digits(num_workers=num_workers), ckpt_path=ckpt_path)
        return method.state_dict(), recorder, probe

    every_step = LastCheckpoint(every_n_train_steps=1, dirpath=str(tmp_path / "stopped"))
    whole, expected, whole_probe = run(tmp_path, None, [LastCheckpoint(dirpath=str(tmp_path / "whole"))])
    _, before, _ = run(tmp_path, None, [every_step, Stop(stop)])
    resumed, after, probe = run(tmp_path, str(tmp_path / "stopped" / "last.ckpt"), [])
    assert len(before.batches) < len(expected.batches)
    assert after.batches == expected.batches[len(expected.batches) - len(after.batches) :]
    assert equal(whole, resumed)
    assert equal(whole_probe.head.state_dict(), probe.head.state_dict())
    assert expected.metrics[-1]["val/knn_top1"] == after.metrics[-1]["val/knn_top1"]


class Teaching(SSLModule):
    """A method of ten lines, with a teacher that counts its moves."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.predictor = nn.Linear(self.embed_dim, 4)
        self.moves: list[int] = []

    def training_loss(self, views: Any) -> Tensor:
        return self.predictor(self.backbone(views[0])).square().mean()

    def update_teacher(self) -> None:
        self.moves.append(self.trainer.global_step)


def test_the_teacher_moves_once_per_optimizer_step(tmp_path: Path) -> None:
    method = Teaching(**BACKBONE)
    running = trainer(tmp_path, accumulate_grad_batches=2, limit_train_batches=8, max_epochs=2)
    running.fit(method, FakeData(batch_size=8))
    assert method.moves == list(range(8))
    assert method.progress == 1.0
    assert Teaching(**BACKBONE).progress == 0.0


def test_the_learning_rate_counts_optimizer_steps_and_the_global_batch(tmp_path: Path) -> None:
    optim, recorder = Optim("sgd", base_lr=1.0, warmup_epochs=1), Recorder()
    running = trainer(tmp_path, accumulate_grad_batches=2, max_epochs=4, callbacks=[recorder])
    running.fit(Teaching(**BACKBONE, optim=optim), FakeData(batch_size=16))
    expected = [0, 0.5, 1, 0.933013, 0.75, 0.5, 0.25, 0.066987]
    assert recorder.lrs[::2] == pytest.approx([lr * 32 / 256 for lr in expected], abs=1e-6)


def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights(tmp_path: Path) -> None:
    class Exploding(Teaching):
        def training_loss(self, views: Any) -> Tensor:
            self.before = {name: p.detach().clone() for name, p in self.named_parameters()}
            loss = super().training_loss(views)
            return loss * float("nan") if self.trainer.global_step == 3 else loss

    method = Exploding(**BACKBONE)
    with pytest.raises(UserError, match=r"loss is nan at step 3 \(epoch 0\).*base_lr"):
        trainer(tmp_path).fit(method, FakeData(batch_size=8))
    for name, p in method.named_parameters():
        assert torch.equal(p, method.before[name])


def test_a_run_can_start_again_after_the_cause_is_removed(tmp_path: Path) -> None:
    class Mended(Teaching):
        broken = True

        def training_loss(self, views: Any) -> Tensor:
            return super().training_loss(views) * (float("inf") if self.broken else 1.0)

    method = Mended(**BACKBONE)
    with pytest.raises(UserError, match="loss is inf at step 0"):
        trainer(tmp_path).fit(method, FakeData(batch_size=8))
    method.broken = False
    trainer(tmp_path).fit(method, FakeData(batch_size=8))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_a_loss_in_any_precision(tmp_path: Path, precision: Any) -> None:
    class Plain(Teaching):
        def training_loss(self, views: Any) -> Tensor:
            return self.predictor(self.backbone(views[0])).abs().mean()

    running = trainer(tmp_path, precision=precision, limit_train_batches=2)
    running.fit(Plain(**BACKBONE), FakeData(batch_size=8))
    assert torch.isfinite(running.callback_metrics["train/loss"])


def test_the_last_checkpoint_is_of_the_last_epoch_also_without_validation(tmp_path: Path) -> None:
    last = LastCheckpoint(dirpath=str(tmp_path))
    running = trainer(
        tmp_path,
        max_epochs=3,
        check_val_every_n_epoch=2,
        limit_train_batches=2,
        enable_checkpointing=True,
        callbacks=[last],
    )
    running.fit(simclr(), digits())
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 6


def test_probes_are_silent_where_validation_has_no_labels(tmp_path: Path) -> None:
    data = digits()
    data.setup()
    assert data.val_images is not None
    data.val_images.labels = None
    running = trainer(tmp_path, callbacks=[LinearProbe(), KNNProbe()])
    running.fit(simclr(), data)
    assert set(running.callback_metrics) == {"train/loss"}


def test_an_endless_loader_needs_no_length_but_for_the_warm_up(tmp_path: Path) -> None:
    loader = torch.utils.data.DataLoader(Endless(), batch_size=None)
    running = trainer(tmp_path, max_epochs=-1, max_steps=4)
    running.fit(simclr(), loader)
    assert running.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(UserError, match="warmup_epochs to 0"):
        trainer(tmp_path, max_epochs=-1, max_steps=4).fit(simclr(optim=Optim(lr_scaling="none")), loader)


def test_probes_are_silent_without_labels_and_say_so_once(
    tmp_path: Path, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from ssl_lightning import ImageFolderData

    data = ImageFolderData(str(photos), labels="none", image_size=32, batch_size=8, num_workers=0)
    running = trainer(tmp_path, max_epochs=2, callbacks=[LinearProbe(), KNNProbe()])
    with caplog.at_level("INFO"):
        running.fit(simclr(), data)
    for probe in ("LinearProbe", "KNNProbe"):
        assert sum(f"{probe}: the data has no labels" in message for message in caplog.messages) == 1
    assert set(running.callback_metrics) == {"train/loss"}


def test_validation_from_a_checkpoint_gives_the_numbers_of_training(tmp_path: Path) -> None:
    running = trainer(tmp_path, max_epochs=2, callbacks=[LinearProbe(), KNNProbe()])
    running.fit(simclr(), digits())
    expected = {key: float(value) for key, value in running.callback_metrics.items() if key.startswith("val/")}
    running.save_checkpoint(tmp_path / "x.ckpt")
    fresh = trainer(tmp_path, callbacks=[LinearProbe(), KNNProbe()])
    (result,) = fresh.validate(simclr(), digits(), ckpt_path=str(tmp_path / "x.ckpt"), verbose=False)
    assert result == pytest.approx(expected)
    assert len(expected) == 6


def test_knn_probe_runs_every_n_epochs_and_at_the_end(tmp_path: Path) -> None:
    recorder = Recorder()
    callbacks = [KNNProbe(every_n_epochs=2, max_samples=100), recorder]
    trainer(tmp_path, max_epochs=3, limit_train_batches=1, callbacks=callbacks).fit(simclr(), digits())
    assert ["val/knn_top1" in metrics for metrics in recorder.metrics] == [False, True, True]


def test_methods_take_the_batches_of_other_loaders(tmp_path: Path) -> None:
    batches = [([torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16)], torch.zeros(4))] * 3
    running = trainer(tmp_path)
    running.fit(simclr(), torch.utils.data.DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    assert running.global_step == 3


def test_knn_votes_by_similarity_not_by_majority() -> None:
    angles = torch.tensor([0.9, 0.8, 0.7]).acos()
    bank = torch.stack([angles.cos(), angles.sin()], dim=1) * 5  # the scale of features does not matter
    query = torch.tensor([[2.0, 0.0]])
    labels = torch.tensor([0, 1, 1])
    assert knn_predict(bank, labels, query, 2, k=3, temperature=0.07).tolist() == [0]
    assert knn_predict(bank, labels, query, 2, k=3, temperature=100.0).tolist() == [1]
    assert knn_predict(bank, labels, query, 2, k=1000).tolist() == [0]  # more neighbours than there are


def test_knn_equals_a_plain_restatement() -> None:
    torch.manual_seed(0)
    bank, labels, queries = torch.randn(50, 8).half(), torch.randint(4, (50,)), torch.randn(7, 8).half()
    expected = []
    for query in queries.float():
        similarities = torch.cosine_similarity(bank.float(), query[None])
        votes = torch.zeros(4)
        for index in similarities.argsort(descending=True)[:10]:
            votes[labels[index]] += (similarities[index] / 0.1).exp()
        expected.append(int(votes.argmax()))
    assert knn_predict(bank, labels, queries, 4, k=10, temperature=0.1).tolist() == expected


def test_a_trainer_with_max_steps_alone_knows_the_epochs_of_the_warm_up(tmp_path: Path) -> None:
    recorder = Recorder()
    running = trainer(tmp_path, max_epochs=None, max_steps=12, callbacks=[recorder])
    running.fit(simclr(optim=Optim("sgd", base_lr=1, lr_scaling="none", warmup_epochs=1)), digits(train_samples=256))
    assert recorder.lrs[:3] == [0, 0.5, 1]  # 2 steps an epoch
