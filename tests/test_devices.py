"""A device that is not the CPU: what stands for a Mac's GPU trains every method, draws, probes and evaluates."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ssl_lightning import DINO, MAE, MoCoV2, SSLModule, SwAV
from ssl_lightning.backbones.names import create_backbone
from ssl_lightning.backbones.vit import _resized
from ssl_lightning.cli import main
from ssl_lightning.commands.evaluate import PROTOCOLS
from tests.processes import FORKSERVER
from tests.small import CNN_AND_VIT, METHODS, VIT, data, slow_unless, small, trainer

pytest.importorskip("torch._C._acc", reason="needs a device written in Python, which torch has since 2.9")
if torch.cuda.is_available():
    pytest.skip("torch knows a single kind of accelerator at a time, and there is a GPU", allow_module_level=True)

STANDIN: dict[str, Any] = {"accelerator": "standin", "strategy": "standin", "inference_mode": False}
QUICK = ["--trainer.max_epochs=1", "--data.train_samples=128", "--data.val_samples=64", "--pictures.every_n_epochs=1"]


@pytest.fixture(scope="module")
def on_device() -> Iterator[Callable[..., None]]:
    """Calls a function in a process that has the device: torch counts it as an accelerator of the whole process."""
    with FORKSERVER.Pool(1) as pool:
        yield lambda function, *arguments: pool.apply_async(_on_device, (function, arguments)).get(timeout=300)


def _on_device(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    from tests.accelerator import on_device

    with on_device():
        function(*arguments)


def _step(method: type[SSLModule], folder: Path, net: dict[str, Any] | None = None, **options: Any) -> None:
    module = small(method, net or {})
    trainer(folder, **STANDIN, max_steps=2, limit_val_batches=0, **options).fit(module, data(method))
    assert module.last_loss is not None


@pytest.mark.parametrize("method", slow_unless(lambda method: method in (MoCoV2, SwAV, MAE), METHODS))
def test_every_method_trains(method: type[SSLModule], on_device: Any, tmp_path: Path) -> None:
    on_device(_step, method, tmp_path)


@pytest.mark.parametrize("backbone", ["whitened_cnn", "whitened_vit"])
def test_whitened_networks_train(backbone: str, on_device: Any, tmp_path: Path) -> None:
    on_device(_step, DINO, tmp_path, {"backbone": backbone, "backbone_kwargs": {"channels": (8, 8, 12)}})


def _deterministic_step(method: type[SSLModule], net: dict[str, Any], folder: Path) -> None:
    try:
        _step(method, folder, net, deterministic=True)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("method", "net"),
    slow_unless(lambda method, _: method is DINO, [(method, net) for method, net in CNN_AND_VIT if net is VIT]),
)
def test_every_method_trains_deterministically(
    method: type[SSLModule], net: dict[str, Any], on_device: Any, tmp_path: Path
) -> None:
    """With small crops of a ViT, too, for which positions are resized."""
    on_device(_deterministic_step, method, net, tmp_path)


@pytest.mark.parametrize("grid", [(2, 2), (3, 5), (7, 7), (20, 13)])
def test_positions_resized_deterministically_are_the_same(grid: tuple[int, int]) -> None:
    vit: Any = create_backbone(VIT["backbone"], **VIT["backbone_kwargs"])
    scale = tuple((new + 0.1) / 4 for new in grid)
    positions = vit.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    expected = F.interpolate(positions, scale_factor=scale, mode="bicubic")
    torch.testing.assert_close(_resized(positions, scale), expected, atol=1e-6, rtol=1e-5)


def _quickstart(folder: Path) -> None:
    words = [
        "--config=configs/quickstart.yaml",
        f"--trainer.default_root_dir={folder}",
        "--trainer.log_every_n_steps=1",
    ]
    main(["fit", *words, *QUICK, *(f"--trainer.{name}={value}" for name, value in STANDIN.items())])


def test_the_quickstart_trains_probes_and_draws(on_device: Any, tmp_path: Path) -> None:
    on_device(_quickstart, tmp_path)
    run = tmp_path / "quickstart" / "version_0"
    pictures = {file.parent.name for file in run.glob("pictures/*/*.png")}
    assert pictures == {"components", "map", "neighbours", "schedules"}
    assert "val/knn_top1" in (run / "metrics.csv").read_text()
    assert (run / "checkpoints" / "best.ckpt").is_file()


def _evaluate(protocol: str, folder: Path) -> None:
    net = [f"--backbone={VIT['backbone']}", f"--backbone_kwargs={VIT['backbone_kwargs']}"]
    words = ["--data=DigitsData", "--data.image_size=32", "--data.train_samples=200", "--data.val_samples=100"]
    more = {"linear": ["--epochs=1"], "finetune": ["--epochs=1"], "lowshot": ["--shots=1", "--draws=2"]}
    words += [f"--trainer={json.dumps(STANDIN)}", f"--output={folder}", *more.get(protocol, [])]
    main(["evaluate", protocol, "--checkpoint=untrained", *net, *words])


@pytest.mark.parametrize("protocol", slow_unless(lambda protocol: protocol in ("knn", "retrieval"), PROTOCOLS))
def test_every_protocol_evaluates(protocol: str, on_device: Any, tmp_path: Path) -> None:
    on_device(_evaluate, protocol, tmp_path)
    assert (tmp_path / protocol / "results.json").is_file()
