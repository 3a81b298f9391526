"""Hooks of Lightning that a subclass overrides without super() change nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssl_lightning import DINO, DeepClusterV2, GramAnchoring, Optim, SimCLR, SSLModule, SwAV, UserError
from tests.small import data, slow_unless, small, trainer

HOOKS = (
    "on_fit_start",
    "on_fit_end",
    "on_train_start",
    "on_train_end",
    "on_train_epoch_start",
    "on_train_epoch_end",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_validation_start",
    "on_validation_end",
    "on_save_checkpoint",
    "on_load_checkpoint",
    "configure_gradient_clipping",
)


def with_own_hooks(method: type[SSLModule]) -> type[Any]:
    """A subclass that overrides all these hooks and calls none of the base class."""

    def do_nothing(self: Any, *args: Any, **kwargs: Any) -> None: ...

    def optimizer_step(self: Any, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)

    return type("Own", (method,), {**dict.fromkeys(HOOKS, do_nothing), "optimizer_step": optimizer_step})


def trained(method: type[SSLModule], folder: Path, **kwargs: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    optim = Optim("adamw", base_lr=1e-3, lr_scaling="none", warmup_epochs=0, end_weight_decay=0.4)
    module = small(method, optim=optim, **kwargs)
    trainer(folder, max_epochs=2, limit_train_batches=3, accumulate_grad_batches=2).fit(module, data(method))
    return module.state_dict()


@pytest.mark.parametrize(
    "method", slow_unless(lambda method: method is DINO, [DINO, DeepClusterV2, GramAnchoring, SwAV])
)
def test_a_subclass_may_override_hooks_without_super(method: type[SSLModule], tmp_path: Path) -> None:
    expected = trained(method, tmp_path)
    found = trained(with_own_hooks(method), tmp_path)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert torch.equal(found[name], value), name


def test_init_from_is_read_whatever_hooks_are_overridden(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = tmp_path / "backbone.pth"
    torch.save(small(SimCLR).backbone.state_dict(), source)
    still = {"optim": Optim("sgd", base_lr=0.0, warmup_epochs=0), "init_from": str(source)}
    module = small(with_own_hooks(SimCLR), still)
    trainer(tmp_path, max_steps=1).fit(module, data(SimCLR))
    for name, value in torch.load(source).items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(module.backbone.state_dict()[name], value), name


def test_a_loss_that_is_not_finite_stops_whatever_hooks_are_overridden(tmp_path: Path) -> None:
    class Broken(with_own_hooks(SimCLR)):  # type: ignore[misc]
        def training_loss(self, views: Any) -> Tensor:
            return super().training_loss(views) * float("nan")

    with pytest.raises(UserError, match="the loss is nan at step 0"):
        trainer(tmp_path, max_steps=1).fit(small(Broken), data(SimCLR))


def test_own_callbacks_come_with_those_of_the_base(tmp_path: Path) -> None:
    class Without(SimCLR):
        def configure_callbacks(self) -> list[Any]:
            return []

    with pytest.raises(UserError, match=r"Without.configure_callbacks must return super\(\).configure_callbacks\(\)"):
        trainer(tmp_path, max_steps=1).fit(small(Without), data(SimCLR))
