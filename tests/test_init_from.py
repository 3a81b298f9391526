"""Pretraining that begins with the weights of another."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import timm
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import Tensor, nn

from ssl_lightning import (
    BYOL,
    DINO,
    IJEPA,
    MAE,
    NPID,
    BEiT,
    DeepClusterV2,
    FakeData,
    GramAnchoring,
    KNNProbe,
    MoCoV2,
    MoCoV3,
    Optim,
    SimCLR,
    SSLModule,
    UserError,
)
from ssl_lightning.backbones.low_rank import merged
from ssl_lightning.checkpoints import open_backbone
from tests.processes import run_processes
from tests.small import BACKBONE, CNN_AND_VIT, LORA, VIT, data, needs_fsdp2, slow_unless, small, trainer

STILL = Optim("sgd", base_lr=0, lr_scaling="none", warmup_epochs=0)


def saved(folder: Path, method: type[SSLModule], *net: dict[str, Any], name: str = "source.ckpt") -> str:
    """A checkpoint of a training of two steps."""
    running = trainer(folder, limit_train_batches=2, limit_val_batches=0)
    running.fit(small(method, *net), data(method))
    running.save_checkpoint(folder / name)
    return str(folder / name)


def knn(module: SSLModule, folder: Path, **kwargs: Any) -> float:
    """The accuracy in a validation of its own."""
    running = trainer(folder, callbacks=[KNNProbe(k=5)])
    running.validate(module, data(type(module)), verbose=False, **kwargs)
    return float(running.callback_metrics["val/knn_top1"])


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    assert found.keys() == expected.keys()
    return all(torch.equal(value, found[name]) for name, value in expected.items())


class Begin(L.Callback):
    """Keeps what a training begins with."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.state = {name: value.clone() for name, value in pl_module.state_dict().items()}


def part(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


@pytest.mark.parametrize(
    ("method", "net"), slow_unless(lambda method, net: (method, net) in ((BYOL, {}), (MAE, VIT)), CNN_AND_VIT)
)
def test_a_run_begins_with_the_backbone_of_its_source(
    method: type[SSLModule], net: dict[str, Any], tmp_path: Path
) -> None:
    source = saved(tmp_path, method, net)
    expected = open_backbone(source).backbone.state_dict()
    torch.manual_seed(5)
    module = small(method, net, init_from=source, optim=STILL)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    begin = Begin()
    running = trainer(tmp_path, callbacks=[begin, probe := KNNProbe(k=5)], limit_train_batches=2)
    running.fit(module, data(method))
    assert probe.num_classes == 4
    backbones = [name for name in ("backbone", "teacher_backbone") if hasattr(module, name)]
    trained = {name for name, _ in module.backbone.named_parameters()}  # DeepCluster v2 has seen all images by then
    for name in backbones:
        assert all(torch.equal(part(begin.state, name)[key], expected[key]) for key in trained)
    learning = [name for name, p in module.named_parameters() if p.requires_grad]
    # before has no heads of Distillation, which come with the teacher
    others = [name for name in learning if name in before and name.split(".")[0] not in backbones]
    if method is not GramAnchoring:  # a stage that goes on with the heads of its source
        assert all(torch.equal(begin.state[name], before[name]) for name in others)
    of_source = method.load_from_checkpoint(source)
    accuracy = knn(of_source, tmp_path)
    assert knn(small(method, net, init_from=source), tmp_path) == accuracy
    if net:  # a rate of 0 moves the statistics of BatchNorm nevertheless
        assert running.callback_metrics["val/knn_top1"] == accuracy


def test_a_run_does_not_depend_on_when_its_weights_came(tmp_path: Path) -> None:
    source = saved(tmp_path, BYOL, VIT)

    def end(init_from: str | None) -> dict[str, Tensor]:
        L.seed_everything(1)
        module = small(BYOL, VIT, init_from=init_from)
        if init_from is None:
            for backbone in (module.backbone, module.teacher_backbone):
                backbone.load_state_dict(open_backbone(source).backbone.state_dict())
        trainer(tmp_path, limit_train_batches=3, num_sanity_val_steps=0).fit(module, data(BYOL))
        return module.state_dict()

    assert same(end(source), end(None))


@pytest.mark.parametrize(
    "method",
    slow_unless(lambda method: method is DINO, [SimCLR, MoCoV2, DINO, MAE, IJEPA, NPID, DeepClusterV2, BEiT]),
)
def test_a_checkpoint_of_such_a_run_does_without_its_source(method: type[SSLModule], tmp_path: Path) -> None:
    source = saved(tmp_path, method, VIT)
    module = small(method, VIT, init_from=source)
    running = trainer(tmp_path, limit_train_batches=3)
    running.fit(module, data(method))
    running.save_checkpoint(tmp_path / "x.ckpt")
    Path(source).unlink()
    again = method.load_from_checkpoint(tmp_path / "x.ckpt")
    begin = Begin()
    trainer(tmp_path, limit_train_batches=1, callbacks=[begin]).fit(again, data(method))  # goes on with its weights
    assert same(part(begin.state, "backbone"), module.backbone.state_dict())
    for init_from in (source, None):
        resumed = small(method, VIT, init_from=init_from)
        trainer(tmp_path, max_epochs=2, limit_train_batches=3).fit(resumed, data(method), ckpt_path=tmp_path / "x.ckpt")
        for command in ("validate", "test", "predict"):
            fresh = small(method, VIT, init_from=source)
            getattr(trainer(tmp_path), command)(fresh, datamodule=data(method), ckpt_path=tmp_path / "x.ckpt")
            assert same(fresh.state_dict(), module.state_dict())


def test_a_second_training_goes_on_with_what_it_finds(tmp_path: Path) -> None:
    module = small(SimCLR, init_from=saved(tmp_path, SimCLR))
    trainer(tmp_path, limit_train_batches=2).fit(module, data(SimCLR))
    end = {name: value.clone() for name, value in module.state_dict().items()}
    trainer(tmp_path, limit_train_batches=2, callbacks=[begin := Begin()]).fit(module, data(SimCLR))
    assert same(begin.state, end)


def test_other_methods_and_files_can_be_the_source(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **VIT["backbone_kwargs"])
    torch.save(
        {"teacher": {f"backbone.{name}": value for name, value in model.state_dict().items()}}, tmp_path / "x.pth"
    )
    sources = {"x.pth": model}
    for method in (SimCLR, MAE):
        source = saved(tmp_path, method, VIT, name=f"{method.__name__}.ckpt")
        sources[f"{method.__name__}.ckpt"] = open_backbone(source).backbone
    for name, backbone in sources.items():
        for method in (DINO, MAE):
            module = small(method, VIT, init_from=str(tmp_path / name))
            trainer(tmp_path).validate(module, data(method), verbose=False)
            images = torch.rand(2, 3, 32, 32)
            expected = backbone.eval().forward_head(backbone.forward_features(images), pre_logits=True)
            torch.testing.assert_close(module.eval()(images), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", slow_unless(lambda method: method is MAE, [MAE, MoCoV3]))
def test_learnt_positions_take_the_place_of_fixed_ones_at_all_sizes_and_after_a_resume(
    method: type[SSLModule], tmp_path: Path
) -> None:
    larger = {**VIT, "backbone_kwargs": {**VIT["backbone_kwargs"], "img_size": 48}}
    source = saved(tmp_path, DINO, larger)
    images = torch.rand(2, 3, 32, 32)
    expected = open_backbone(source).backbone(images)
    module = small(method, larger, init_from=source, optim=STILL)
    running = trainer(tmp_path, limit_train_batches=2)
    running.fit(module, data(method))
    assert not module.backbone.pos_embed.requires_grad
    running.save_checkpoint(tmp_path / "x.ckpt")
    resumed = small(method, larger)
    trainer(tmp_path).validate(resumed, data(method), ckpt_path=tmp_path / "x.ckpt", verbose=False)
    for found in (module.eval(), resumed.eval(), open_backbone(str(tmp_path / "x.ckpt")).backbone):
        torch.testing.assert_close(found(images), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("source", "model", "message"),
    [
        (
            {},
            {"backbone": "resnet18", "backbone_kwargs": {}},
            r"a resnet10_cifar .* but a resnet18 .* is needed: .* missing",
        ),
        ({}, VIT, "a resnet10_cifar .* but a vit_tiny_patch16_224 .* is needed: .* left over"),
        (
            {},
            {"backbone_kwargs": {**BACKBONE["backbone_kwargs"], "stem_stride": 1}},
            "weights fit, but the features differ",
        ),
        (VIT, {**VIT, "backbone_kwargs": {**VIT["backbone_kwargs"], "num_heads": 4}}, "weights fit, but the features"),
    ],
)
def test_another_backbone_is_refused_before_training(
    source: dict[str, Any], model: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = saved(tmp_path, SimCLR, source)
    module = small(SimCLR, model, init_from=path)
    running = trainer(tmp_path)
    with pytest.raises(UserError, match=f"model.init_from .*source.ckpt does not fit the model: it is .*{message}"):
        running.fit(module, data(SimCLR))
    assert running.global_step == 0


def test_files_that_do_not_tell_and_files_that_are_not_there_are_refused_before_training(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "x.pth")
    for name, message in (
        ("x.pth", "not hold a resnet10_cifar"),
        ("y.ckpt", "does not exist"),
        ("y", "unknown backbone"),
    ):
        with pytest.raises(UserError, match=f"model.init_from .*{message}"):
            trainer(tmp_path).fit(small(SimCLR, init_from=str(tmp_path / name) if "." in name else name), data(SimCLR))


class Stop(L.Callback):
    """Ends a training after an epoch."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = True


def _begin(rank: int, source: str, folder: Path) -> list[dict[str, Tensor]]:
    states = []
    for strategy in ("ddp", "fsdp2"):
        module = small(DINO, LORA, init_from=source, continued={"frozen_steps": 2})  # and keep it
        running = trainer(
            folder,
            strategy=strategy,
            devices=2,
            plugins=[LightningEnvironment()],
            callbacks=[Stop()],
            max_epochs=2,
            limit_train_batches=2,
        )
        running.fit(module, FakeData(batch_size=8, seed=0, num_workers=0))
        states.append(dict(running.strategy.lightning_module_state_dict()))
    return states


@needs_fsdp2
def test_all_processes_begin_with_the_source(tmp_path: Path) -> None:
    source = saved(tmp_path, DINO, VIT)
    expected = open_backbone(source).backbone.state_dict()
    (ddp, sharded), (other, _) = run_processes(_begin, 2, source, tmp_path)  # what was sharded, the first has
    for state in (ddp, sharded, other):
        for name in ("backbone", "teacher_backbone"):
            assert same(merged(part(state, name)), expected)
