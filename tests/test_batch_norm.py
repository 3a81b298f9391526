"""BatchNorm over processes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d
from timm.layers import SyncBatchNormAct as TorchSyncBatchNormAct
from torch import Tensor, nn

from ssl_lightning.batch_norm import SyncedBatchNorm
from tests.processes import run_processes

SHAPES = {"1d": (6, 5), "1d with length": (6, 5, 3), "2d": (6, 5, 4, 4), "activated": (6, 5, 4, 4), "averaging": (6, 5)}


def _layer(kind: str) -> nn.Module:
    torch.manual_seed(1)
    layers: dict[str, Any] = {
        "1d": nn.BatchNorm1d(5),
        "1d with length": nn.BatchNorm1d(5, affine=False),
        "2d": nn.BatchNorm2d(5),
        "activated": BatchNormAct2d(5, inplace=False),
        "averaging": nn.BatchNorm1d(5, momentum=None, eps=1e-3),
    }
    layer = layers[kind].double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def _trained(rank: int, kind: str, processes: int) -> dict[str, Tensor]:
    layer = _layer(kind)
    plugin = SyncedBatchNorm()
    holder = nn.ModuleList([layer, nn.Linear(1, 1)])
    if processes > 1:
        plugin.apply(holder)
        assert type(layer).__module__ == "ssl_lightning.batch_norm"
    torch.manual_seed(2)
    found = {}
    for step in range(2):
        whole = torch.randn(SHAPES[kind], dtype=torch.float64) * 3 + 1
        weight = torch.randn(SHAPES[kind], dtype=torch.float64)
        part = whole.chunk(processes)[rank].requires_grad_()
        out = layer(part)
        (out * weight.chunk(processes)[rank]).sum().backward()
        found |= {f"out {step}": out.detach(), f"input {step}": part.grad}
    plugin.revert(holder)
    assert type(layer) is type(_layer(kind))
    shared = {name: p.grad for name, p in layer.named_parameters()} | dict(layer.named_buffers())
    layer.eval()
    return {**found, **shared, "eval": layer(whole).detach()}


def _all(rank: int) -> dict[str, dict[str, Tensor]]:
    return {kind: _trained(rank, kind, 2) for kind in SHAPES}


@pytest.fixture(scope="module")
def of_two_processes() -> list[dict[str, dict[str, Tensor]]]:
    return run_processes(_all, 2)


@pytest.mark.parametrize("kind", SHAPES)
def test_two_processes_normalise_as_one(kind: str, of_two_processes: list[dict[str, dict[str, Tensor]]]) -> None:
    expected = _trained(0, kind, 1)
    parts = [found[kind] for found in of_two_processes]
    for name, value in expected.items():
        if name.startswith(("out", "input")):
            found = torch.cat([part[name] for part in parts])
        elif name in ("weight", "bias"):
            found = sum(part[name] for part in parts)
        else:
            found = parts[0][name]
        torch.testing.assert_close(found, value, atol=1e-12, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_layers_and_their_state_stay_the_same_objects() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    layers, state = list(model), list(model.state_dict())
    plugin = SyncedBatchNorm()
    assert plugin.apply(model) is model
    assert list(model) == layers
    assert list(model.state_dict()) == state
    plugin.revert(model)
    assert type(model[1]) is nn.BatchNorm2d


def test_on_gpus_layers_become_those_of_torch_and_timm_although_they_lie_on_the_cpu_yet() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), BatchNormAct2d(3))
    model._trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda")))  # type: ignore[assignment]
    SyncedBatchNorm().apply(model)
    assert [type(layer) for layer in model] == [nn.SyncBatchNorm, TorchSyncBatchNormAct]
