"""What a training step costs: the counter, the benchmark, and that nothing in a step waits for the device."""

import json
import subprocess
import sys
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from ssl_lightning import DINO, MAE, KNNProbe, LinearProbe, MoCoV2, ProgressBar, SSLModule, SwAV, Throughput, UserError
from ssl_lightning.commands import benchmark
from ssl_lightning.commands.benchmark import OperationCounter, step
from ssl_lightning.data.batches import Views
from tests.small import BACKBONE, METHODS, slow_unless, small, trainer

NARROW: dict[str, dict[str, Any]] = {
    "SimCLR": {},
    "MoCoV2": {"queue_length": 64},
    "MoCoV3": {"hidden_dim": 32},
    "BYOL": {"hidden_dim": 32},
    "SwAV": {"hidden_dim": 32, "num_prototypes": 32},
    "DINO": {"hidden_dim": 32, "num_prototypes": 32, "bottleneck_dim": 16},
    "MAE": {"backbone_kwargs": {"depth": 2}, "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2},
}


def test_operations_are_counted_in_both_passes() -> None:
    weight = torch.ones(3, requires_grad=True)
    with OperationCounter() as counter:
        (weight * 2).sum().backward()
    assert counter.counts["aten.mul.Tensor"] == 2  # forward, backward
    assert counter.counts["aten.sum.default"] == 1
    assert not counter.synchronisations


def test_a_call_for_many_tensors_is_one_operation() -> None:
    with OperationCounter() as counter:
        torch._foreach_mul([torch.ones(2) for _ in range(5)], 2.0)
    assert counter.counts["aten._foreach_mul.Scalar"] == counter.counts.total() - 5 == 1


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x.index_put((x > 0,), x[:1]),
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: x.unique(),
        lambda x: x.masked_select(x > 0),
    ],
)
def test_what_depends_on_values_synchronises(wait: Any) -> None:
    values = torch.ones(4)
    with OperationCounter() as counter:
        wait(values)
    assert counter.synchronisations.total() == 1


def test_what_needs_no_values_does_not_synchronise() -> None:
    values, index = torch.ones(4), torch.tensor([1, 0])
    with OperationCounter() as counter:
        torch.where(values > 0, values, 0.0)[index].index_put((index[:1],), values[0]).masked_fill(index > 0, 1.0)[:1]
        values.to(torch.float64).numpy()
    assert not counter.synchronisations


def test_peak_bytes_are_those_alive_at_a_time() -> None:
    held, other = torch.zeros(1000), torch.zeros(1000)
    with OperationCounter([held]) as counter:
        first = other + 1
        first.add_(1)[:10].mul_(2)  # no new memory
        del first
        second = other + 1
        del held
        third = second * 2
    assert counter.peak_bytes == 8000
    assert len(third) == 1000


class Ready(L.LightningDataModule):
    """Five batches of views that are there already."""

    num_classes = 2
    batch_size = 8
    train_images = range(16)

    def __init__(self, views: int) -> None:
        super().__init__()
        self.batch = Views([torch.rand(8, 3, 32, 32) for _ in range(views)], torch.arange(8) % 2, torch.arange(8))

    def train_dataloader(self) -> Any:
        return DataLoader([self.batch] * 5, batch_size=None)  # type: ignore[arg-type]


class CountSteps(L.Callback):
    """Counts from the start of one step to the start of the next."""

    def __init__(self) -> None:
        self.counters: list[OperationCounter] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.counters:
            self.counters[-1].__exit__(None, None, None)
        self.counters.append(OperationCounter())
        self.counters[-1].__enter__()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.counters.pop().__exit__(None, None, None)


@pytest.mark.parametrize("method", slow_unless(lambda method: method in (MoCoV2, SwAV, DINO, MAE), METHODS))
def test_no_step_waits_for_the_device(method: type[SSLModule], tmp_path: Any) -> None:
    """With the probes and the progress bar, but for the steps that are written to a logger."""
    count = CountSteps()
    callbacks = [count, LinearProbe(), KNNProbe(), Throughput(every_n_steps=1), ProgressBar()]
    quiet = trainer(tmp_path, callbacks=callbacks, enable_progress_bar=True)
    quiet.fit(small(method), datamodule=Ready(method.global_views or 2))
    assert len(count.counters) == 4
    for counter in count.counters:
        assert counter.counts.total() > 100
        assert not counter.synchronisations
    shown = callbacks[-1].get_metrics(quiet, quiet.lightning_module)  # type: ignore[attr-defined]
    assert {"loss", "rate"} <= shown.keys()


@pytest.mark.parametrize("model", slow_unless(lambda model: model in ("SimCLR", "MoCoV3"), NARROW))
def test_the_step_is_measured_beside_bare_passes_and_lightly(model: str) -> None:
    backbone = {"backbone": "vit_tiny_patch16_224"} if model == "MAE" else BACKBONE
    result = step(model, image_size=48, batch_size=4, steps=1, model_kwargs={**backbone, **NARROW[model]})
    found = json.loads(result.json)
    views = {"SwAV": [48] * 2 + [24] * 6, "DINO": [48] * 2 + [24] * 8, "MAE": [48]}.get(model, [48] * 2)
    assert found["sizes"] == views
    assert found["bare_ratio"] == pytest.approx(found["ours"]["ms"] / found["bare"]["ms"])
    assert found["ours"]["operations"] > found["bare"]["operations"] > 0
    assert found["ours"]["synchronisations"] == found["bare"]["synchronisations"] == 0
    assert found["ours"]["peak_bytes"] > 0
    if model == "MoCoV3":  # lightly has none
        assert found["lightly"] is None
        assert "lightly" not in str(result)
    else:
        assert found["lightly_ratio"] == pytest.approx(found["lightly"]["ms"] / found["ours"]["ms"])
        assert "lightly" in str(result)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["SimCLR", "MoCoV2", "BYOL", "SwAV", "DINO"])
def test_a_step_dispatches_seven_tenths_of_the_operations_of_lightlys(model: str) -> None:
    result = step(model, "resnet50", image_size=32, batch_size=4, steps=1, model_kwargs=NARROW[model])
    assert result.ratios["operations_ratio"] <= 0.7
    assert result.ours.operations <= 1.25 * result.bare.operations


def test_an_unknown_method_is_told() -> None:
    with pytest.raises(UserError, match=r"--model SimCRL: no such method; did you mean SimCLR\?"):
        step("SimCRL")


def test_arguments_of_the_method_are_typed_as_for_fit() -> None:
    words = "step --model DINO --backbone resnet18 --model.num_prototypes=8 --model.trainable.lora.rank 4"
    with pytest.raises(UserError, match=r"--model\.trainable\.lora: the backbone has no blocks"):
        benchmark.run(words.split())


@pytest.mark.slow
def test_the_step_on_the_command_line() -> None:
    words = "benchmark step --model SimCLR --backbone resnet10_cifar --image-size 16 --batch-size=4 --steps 1 --json"
    done = subprocess.run([sys.executable, "-m", "ssl_lightning", *words.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["model"], found["backbone"], found["batch_size"]) == ("SimCLR", "resnet10_cifar", 4)
    assert found["ours"]["synchronisations"] == 0
