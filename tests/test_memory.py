"""Compiling, and computing blocks twice instead of keeping what is inside them: the same result."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssl_lightning import DINO, IJEPA, MAE, NPID, DINOv2, MoCoV2, Optim, SimCLR, SSLModule, SwAV, UserError
from tests.small import VIT, data, met, small, some_methods, trainer

SGD = Optim("sgd", base_lr=0.01, lr_scaling="none", warmup_epochs=0)
DROP: dict[str, Any] = {**VIT, "backbone_kwargs": {**VIT["backbone_kwargs"], "drop_path_rate": 0.3}}


def gradients(module: SSLModule) -> tuple[float, dict[str, Tensor], int]:
    """Loss, gradients, and the bytes that the forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    torch.manual_seed(5)
    views = list(torch.rand(module.global_views or 1, 8, 3, 32, 32))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = module.training_loss(views)
    loss.backward()
    return (
        loss.item(),
        {name: p.grad for name, p in module.named_parameters() if p.grad is not None},
        sum(kept.values()),
    )


@some_methods
def test_checkpointed_blocks_change_memory_not_gradients(method: type[SSLModule]) -> None:
    results = []
    for flag in (False, True):
        torch.manual_seed(0)
        results.append(gradients(met(small(method, DROP, checkpoint_blocks=flag), 8)))
    (loss, expected, memory), (again, found, less) = results
    assert again == loss
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert less < 0.7 * memory


@pytest.mark.slow
@pytest.mark.parametrize("method", [SimCLR, MoCoV2, SwAV, DINO, MAE, DINOv2, IJEPA, NPID])
def test_a_compiled_method_trains_as_it_would_without(
    method: type[SSLModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[Any] = []

    def traced(graph: Any, inputs: Any) -> Any:  # all of torch.compile but the code that it writes
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=traced))
    torch._dynamo.reset()
    states = []
    for flag in (False, True):
        torch.manual_seed(0)
        module = small(method, {"drop_path": 0.0} if method is DINO else {}, optim=SGD, compile=flag)
        running = trainer(tmp_path, limit_train_batches=2, limit_val_batches=0)
        running.fit(module, data(method))
        states.append(module.state_dict())
    assert graphs
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, atol=1e-5, rtol=1e-4, msg=name)
    running.save_checkpoint(tmp_path / "x.ckpt")
    graphs.clear()
    method.load_from_checkpoint(tmp_path / "x.ckpt")(torch.rand(2, 3, 32, 32))
    assert not graphs  # a checkpoint is used without compiling


def test_backbones_without_blocks_to_compute_twice_are_refused() -> None:
    with pytest.raises(UserError, match=r"BatchNorm would count every batch twice; .*model.backbone to a ViT"):
        small(SimCLR, checkpoint_blocks=True)
    with pytest.raises(UserError, match=r"no blocks to compute again; set --model.checkpoint_blocks to false"):
        small(
            SimCLR, {"backbone": "torchvision/vit_b_16", "backbone_kwargs": {"image_size": 32}}, checkpoint_blocks=True
        )
