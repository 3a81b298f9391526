"""Batches larger than memory: chunks give the gradient of the whole batch in the memory of one chunk."""

from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssl_lightning import LinearProbe, MoCoV3, SimCLR, SSLModule, UserError
from ssl_lightning.commands.benchmark.counter import OperationCounter
from ssl_lightning.distributed import world_size
from ssl_lightning.grad_cache import encode_in_chunks
from tests.processes import run_processes
from tests.small import BACKBONE, VIT, digits, slow_unless, small, trainer

CHUNKED: list[type[SSLModule]] = [SimCLR, MoCoV3]
DROP_PATH: dict[str, Any] = {**VIT, "backbone_kwargs": {**VIT["backbone_kwargs"], "drop_path_rate": 0.3}}
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d)

every_method = pytest.mark.parametrize("method", CHUNKED)


def random_views(batch: int = 11, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(batch, 3, 32, 32, dtype=dtype, generator=generator) for _ in range(2)]


def build(method: type[SSLModule], net: dict[str, Any], chunk_size: int | None, frozen: bool = True) -> Any:
    torch.manual_seed(0)
    module = small(method, net, chunk_size=chunk_size).double()
    for part in module.modules():
        if frozen and isinstance(part, BATCH_NORM):
            part.eval()
    return module


def gradients(module: SSLModule, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    found = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in found.values())
    return found | {"loss": loss.detach()}  # type: ignore[return-value]


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, value in other.items():
        torch.testing.assert_close(one[name], value, atol=1e-10, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(  # each pair of values occurs among those that are not slow
    ("method", "net", "chunk_size"),
    slow_unless(
        lambda method, net, chunk_size: ((method is SimCLR) == (net is VIT)) == (chunk_size in (2, 11)),
        product(CHUNKED, [BACKBONE, VIT], [2, 4, 11, 100]),
    ),
)
def test_gradients_equal_those_of_the_whole_batch(method: Any, net: dict[str, Any], chunk_size: int) -> None:
    views = random_views()
    expected, module = build(method, net, None), build(method, net, chunk_size)
    close(gradients(module, module.training_loss(views)), gradients(expected, expected.training_loss(views)))


@every_method
def test_a_vit_is_exact_with_live_batch_norm_in_the_heads(method: Any) -> None:
    views = random_views()
    expected, module = build(method, VIT, None, frozen=False), build(method, VIT, 4, frozen=False)
    close(gradients(module, module.training_loss(views)), gradients(expected, expected.training_loss(views)))
    close(module.state_dict(), expected.state_dict())


def in_one_pass(backbone: nn.Module, views: Any, chunk_size: int) -> Tensor:
    """The same chunks, all kept in memory."""
    chunks = [chunk for view in views for chunk in view.tensor_split(-(-len(view) // chunk_size))]
    return torch.cat([backbone(chunk) for chunk in chunks])


@every_method
@pytest.mark.parametrize("net", [BACKBONE, DROP_PATH], ids=["resnet", "vit"])
def test_what_is_recomputed_is_what_was_computed(
    method: Any, net: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drop path draws the same paths, BatchNorm's statistics move once per chunk, and the random numbers go on."""
    results = []
    for encode in (encode_in_chunks, in_one_pass):
        monkeypatch.setattr(f"{method.__module__}.encode_in_chunks", encode)
        module = build(method, net, 4, frozen=False)
        torch.manual_seed(7)
        loss = module.training_loss(random_views())
        after = torch.rand(1)
        found = gradients(module, loss)
        results.append({**found, **module.state_dict(), "after": after, "after the backward pass": torch.rand(1)})
    close(*results)
    if net is BACKBONE:
        assert module.backbone.bn1.num_batches_tracked == 2 * 3


def test_drop_path_draws_anew_for_every_chunk() -> None:
    backbone = build(SimCLR, DROP_PATH, 4).backbone
    image = random_views()[0][:1]
    features = encode_in_chunks(backbone, [image.repeat(8, 1, 1, 1)], 2)
    assert len(features.unique(dim=0)) > 1
    assert not torch.equal(features[:2], features[2:4]) or not torch.equal(features[4:6], features[6:])


def test_a_backbone_may_also_be_called_outside_the_chunks() -> None:
    backbone = build(SimCLR, BACKBONE, 4, frozen=False).backbone
    views = random_views()
    before = backbone(views[0])
    (before.sum() + encode_in_chunks(backbone, views, 4).sum() + backbone(views[1]).sum()).backward()


@every_method
@pytest.mark.parametrize("net", [BACKBONE, DROP_PATH], ids=["resnet", "vit"])
def test_autocast_is_the_same_when_recomputed(
    method: Any, net: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for encode in (encode_in_chunks, in_one_pass):
        monkeypatch.setattr(f"{method.__module__}.encode_in_chunks", encode)
        module = build(method, net, 4, frozen=False).float()
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16):
            loss = module.training_loss(random_views(dtype=torch.float32))
        assert loss.dtype == torch.float32
        results.append(gradients(module, loss))
    for name, value in results[1].items():
        torch.testing.assert_close(results[0][name], value, msg=lambda m, n=name: f"{n}: {m}")


class Step(nn.Module):
    """What Lightning wraps in DistributedDataParallel: the loss as a forward."""

    def __init__(self, method: SSLModule) -> None:
        super().__init__()
        self.method = method

    def forward(self, views: list[Tensor]) -> Tensor:
        return self.method.training_loss(views)


def _steps(rank: int, chunk_size: int | None) -> list[tuple[dict[str, Tensor], int]]:
    results = []
    for method in CHUNKED:
        module = build(method, BACKBONE, chunk_size)
        step: Any = Step(module)
        calls = 0
        if world_size() > 1:
            step = DistributedDataParallel(step, bucket_cap_mb=0.01)  # several buckets
        weight = module.backbone.conv1.weight

        def count(_p: Tensor) -> None:
            nonlocal calls
            calls += 1

        weight.register_post_accumulate_grad_hook(count)
        loss = step([view.chunk(world_size())[rank] for view in random_views(batch=12)])
        results.append((gradients(module, loss), calls))
    return results


def test_two_processes_under_ddp_equal_one() -> None:
    pairs = zip(*run_processes(_steps, 2, 4), _steps(0, None), strict=True)
    for (first, calls), (second, _), (expected, _) in pairs:
        assert calls == 1
        assert first.keys() == expected.keys()
        for name, value in expected.items():
            if name == "loss":
                torch.testing.assert_close((first[name] + second[name]) / 2, value, atol=1e-10, rtol=0)
            else:
                torch.testing.assert_close(first[name], value, atol=1e-10, rtol=0)
                assert torch.equal(first[name], second[name])


def peak(module: SSLModule, batch: int) -> int:
    views = random_views(batch, torch.float32)
    with OperationCounter() as memory:
        module.training_loss(views).backward()
    return memory.peak_bytes


@pytest.mark.parametrize(
    ("method", "net"), slow_unless(lambda *case: case == (SimCLR, BACKBONE), product(CHUNKED, [BACKBONE, VIT]))
)
def test_memory_is_that_of_a_chunk(method: Any, net: dict[str, Any]) -> None:
    whole, module = (small(method, net, chunk_size=size) for size in (None, 8))
    one, many = peak(module, 8), peak(module, 128)
    assert many < 2 * one  # sixteen times the images
    assert many < peak(whole, 128) / 5


class Features(L.Callback):
    """The features of each training step, and what the backbone gives for its first view."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            self.pairs.append((outputs["features"], pl_module(batch[0][0])))


@every_method
def test_probes_get_the_features_of_all_images_in_order(method: Any, tmp_path: Path) -> None:
    class Frozen(method):  # type: ignore[misc]
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.backbone.eval().requires_grad_(False)

    watch = Features()
    running = trainer(tmp_path, callbacks=[watch, LinearProbe()], limit_train_batches=3)
    running.fit(small(Frozen, chunk_size=24), digits())  # 24 does not divide the batch of 128
    assert len(watch.pairs) == 3
    for found, expected in watch.pairs:
        torch.testing.assert_close(found, expected)
    assert "val/linear_top1" in running.callback_metrics


@pytest.mark.parametrize(
    ("method", "precision", "tolerance"),
    slow_unless(
        lambda method, precision, _: (method is SimCLR) == (precision == "64-true"),
        [(method, *rest) for method in CHUNKED for rest in (("64-true", 1e-8), ("bf16-mixed", 0.02))],
    ),
)
def test_a_training_in_chunks_is_that_of_the_whole_batch(
    method: Any, precision: Any, tolerance: float, tmp_path: Path
) -> None:
    results = []
    for chunk_size in (None, 12):
        L.seed_everything(0)
        running = trainer(tmp_path, precision=precision, accumulate_grad_batches=2, limit_train_batches=4)
        running.fit(small(method, VIT, chunk_size=chunk_size), digits(batch_size=32))
        results.append(running.callback_metrics["train/loss"])
    torch.testing.assert_close(results[1], results[0], atol=0, rtol=tolerance)


@every_method
@pytest.mark.parametrize("chunk_size", [1, 0, -8])
def test_chunks_of_fewer_than_two_images_are_refused(method: Any, chunk_size: int) -> None:
    with pytest.raises(UserError, match=r"set --model\.chunk_size to 2 or more, or to null"):
        small(method, chunk_size=chunk_size)
