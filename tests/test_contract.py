"""What every method promises; a new method is one more entry of METHODS."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ssl_lightning
from ssl_lightning import FakeData, SSLModule
from tests.small import ADAMW, BACKBONE, trainer

METHODS = [
    value
    for value in vars(ssl_lightning).values()
    if isinstance(value, type) and issubclass(value, SSLModule) and value is not SSLModule
]

every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)


def small(method: type[SSLModule], **kwargs: Any) -> SSLModule:
    return method(**{**BACKBONE, "optim": ADAMW, **kwargs})  # type: ignore[arg-type]


@every_method
def test_a_step_gives_a_finite_loss_and_every_parameter_a_gradient(method: type[SSLModule], tmp_path: Path) -> None:
    module = small(method)
    missing: list[str] = []

    class Gradients(ssl_lightning.Throughput):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            missing.extend(name for name, p in pl_module.named_parameters() if p.requires_grad and p.grad is None)

    running = trainer(tmp_path, callbacks=[Gradients()], limit_train_batches=2)
    running.fit(module, FakeData(batch_size=8))
    assert torch.isfinite(running.callback_metrics["train/loss"])
    assert not missing


@every_method
def test_features_have_the_promised_width(method: type[SSLModule]) -> None:
    module = small(method).eval()
    assert module(torch.rand(2, 3, 32, 32)).shape == (2, module.embed_dim)


@every_method
def test_bf16_loss_is_close_to_float32(method: type[SSLModule], tmp_path: Path) -> None:
    losses = []
    for precision in ("32-true", "bf16-mixed"):
        torch.manual_seed(0)
        module = small(method)
        running = trainer(tmp_path, precision=precision, max_steps=1)
        running.fit(module, FakeData(batch_size=32, seed=0))
        loss = running.callback_metrics["train/loss"]
        assert loss.dtype == torch.float32
        losses.append(float(loss))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@every_method
def test_the_backbone_can_be_compiled(method: type[SSLModule]) -> None:
    torch.manual_seed(0)
    module = small(method)
    views = list(torch.rand(2, 4, 3, 32, 32))
    with torch.no_grad():
        expected = module.training_loss(views)
        module.backbone.compile()
        torch.testing.assert_close(module.training_loss(views), expected, atol=1e-4, rtol=1e-4)


@every_method
def test_a_subclass_with_one_override_trains(method: type[SSLModule], tmp_path: Path) -> None:
    class Doubled(method):  # type: ignore[misc,valid-type]
        def training_loss(self, views: list[Tensor]) -> Tensor:
            return 2 * super().training_loss(views)

    trainer(tmp_path, limit_train_batches=2).fit(small(Doubled), FakeData(batch_size=8))


@every_method
def test_a_checkpoint_holds_what_builds_the_method_again(method: type[SSLModule], tmp_path: Path) -> None:
    running = trainer(tmp_path, limit_train_batches=1)
    module = small(method)
    running.fit(module, FakeData(batch_size=8))
    running.save_checkpoint(tmp_path / "x.ckpt")
    torch.load(tmp_path / "x.ckpt", weights_only=True)  # no code in it
    again = method.load_from_checkpoint(tmp_path / "x.ckpt")
    assert again.optim == module.optim
    for name, value in module.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
