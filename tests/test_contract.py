"""What every method promises; a new method is one more public class."""

import copy
import inspect
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

import ssl_lightning
from ssl_lightning import (
    DINO,
    MAE,
    FakeData,
    Jigsaw,
    LastCheckpoint,
    LinearProbe,
    MoCoV2,
    Optim,
    SimCLR,
    SSLModule,
    SwAV,
    UserError,
    ViewSpec,
)
from ssl_lightning.commands import check
from ssl_lightning.ranges import _OF_METHODS
from tests.processes import run_processes
from tests.small import (
    CNN_AND_VIT,
    LORA,
    METHODS,
    VIT,
    VIT_ONLY,
    data,
    every_backbone,
    every_method,
    met,
    slow_unless,
    small,
    some_methods,
    trainer,
)

SGD = Optim("sgd", base_lr=0.1, lr_scaling="none", warmup_epochs=0)


class Watch(L.Callback):
    """What happens to parameters, optimizers and teachers, step by step."""

    def __init__(self) -> None:
        self.without_gradient: set[str] = set()
        self.followers: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        missing = {name for name, p in pl_module.named_parameters() if p.requires_grad and p.grad is None}
        self.without_gradient |= missing
        optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, p in pl_module.named_parameters():
            assert (id(p) in optimized) == p.requires_grad, name
            if name.startswith("teacher_"):
                assert p.grad is None, name
                assert not p.requires_grad, name

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.followers.append(
            {
                name: value.clone()
                for name, value in pl_module.state_dict().items()
                if name.startswith(("teacher_", "queue", "center", "memory", "usage"))
                and "running" not in name
                and "num_b" not in name
            }
        )


@every_backbone
def test_a_step_gives_a_finite_loss_and_every_parameter_a_gradient(
    method: type[SSLModule], net: dict[str, Any], tmp_path: Path
) -> None:
    watch = Watch()
    running = trainer(tmp_path, callbacks=[watch], limit_train_batches=2)
    running.fit(small(method, net), data(method))
    assert torch.isfinite(running.callback_metrics["train/loss"])
    assert not watch.without_gradient


@every_method
def test_teacher_queue_memory_and_centre_move_once_per_optimizer_step(method: type[SSLModule], tmp_path: Path) -> None:
    watch = Watch()
    running = trainer(tmp_path, callbacks=[watch], accumulate_grad_batches=2)
    queue: dict[str, Any] = {"queue_length": 32, "queue_start_epoch": 0} if method is SwAV else {}
    running.fit(small(method, queue), data(method))
    states = watch.followers
    if states[0]:
        assert len(states) == 8
        for batch in range(1, 7):  # in the last step a momentum that rises to 1 has arrived
            still = all(torch.equal(value, states[batch - 1][name]) for name, value in states[batch].items())
            assert still == (batch % 2 == 0), batch
    else:
        assert method.update_teacher is SSLModule.update_teacher


@pytest.mark.parametrize(
    ("method", "net"), slow_unless(lambda method, net: method is MoCoV2 and not net, [*CNN_AND_VIT, (DINO, LORA)])
)
def test_a_resumed_run_ends_bit_for_bit_as_the_uninterrupted(
    method: type[SSLModule], net: dict[str, Any], tmp_path: Path
) -> None:
    queue: dict[str, Any] = {"queue_length": 16, "queue_start_epoch": 0} if method is SwAV else {}

    def run(stop: int | None, ckpt_path: str | None) -> dict[str, Any]:
        L.seed_everything(1)

        class Stop(L.Callback):
            def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
                if trainer.global_step == stop:
                    raise KeyboardInterrupt

        last = LastCheckpoint(every_n_train_steps=5, dirpath=str(tmp_path / str(stop)))
        running = trainer(tmp_path, max_epochs=2, callbacks=[last, Stop()], enable_checkpointing=True)
        module = small(method, net, queue)
        with suppress(KeyboardInterrupt, SystemExit):
            running.fit(module, data(method, batch_size=16), ckpt_path=ckpt_path)
        return module.state_dict()

    whole = run(None, None)
    stopped = run(6, None)  # in the middle of the second epoch
    assert any(not torch.equal(value, whole[name]) for name, value in stopped.items())
    resumed = run(None, str(tmp_path / "6" / "last.ckpt"))
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


@every_backbone
def test_features_have_the_promised_width(method: type[SSLModule], net: dict[str, Any]) -> None:
    module = small(method, net).eval()
    assert module(torch.rand(2, 3, 32, 32)).shape == (2, module.embed_dim)


@pytest.mark.parametrize("method", slow_unless(lambda method: method in (SimCLR, SwAV, DINO, MAE), METHODS))
def test_bf16_loss_is_close_to_float32(method: type[SSLModule], tmp_path: Path) -> None:
    losses = []
    for precision in ("32-true", "bf16-mixed"):
        torch.manual_seed(0)
        module = small(method)
        running = trainer(tmp_path, precision=precision, max_steps=1)
        running.fit(module, data(method, batch_size=32))
        loss = running.callback_metrics["train/loss"]
        assert loss.dtype == torch.float32
        losses.append(float(loss))
    assert losses[1] == pytest.approx(losses[0], rel=0.02, abs=0.01)


@pytest.mark.parametrize("method", slow_unless(lambda method: method is SimCLR, METHODS))
def test_the_backbone_can_be_compiled(method: type[SSLModule]) -> None:
    torch.manual_seed(0)
    signatures = [inspect.signature(base) for base in method.__mro__ if issubclass(base, SSLModule)]
    still = {"drop_path": 0.0} if any("drop_path" in one.parameters for one in signatures) else {}
    module = met(small(method, {"bn_splits": 1} if method is MoCoV2 else {}, still), 4)
    views = list(torch.rand(2, 4, 3, 32, 32))
    backend = "inductor" if method is ssl_lightning.MAE else "aot_eager"  # the same graphs, without the C++ of each
    losses = []
    for compiled in (False, True):
        if compiled:
            for part in module.compiled_parts:
                part.compile(backend=backend)
        torch.manual_seed(0)  # masks
        with torch.no_grad():
            losses.append(module.training_loss(views))
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-4)


@every_method
def test_a_subclass_with_one_override_trains(method: type[SSLModule], tmp_path: Path) -> None:
    class Doubled(method):  # type: ignore[misc,valid-type]
        def training_loss(self, views: list[Tensor]) -> Tensor:
            return 2 * super().training_loss(views)

    trainer(tmp_path, limit_train_batches=2).fit(small(Doubled), data(method))


@every_method
def test_a_checkpoint_holds_what_builds_the_method_again(method: type[SSLModule], tmp_path: Path) -> None:
    running = trainer(tmp_path, limit_train_batches=1)
    module = small(method)
    running.fit(module, data(method))
    running.save_checkpoint(tmp_path / "x.ckpt")
    torch.load(tmp_path / "x.ckpt", weights_only=True)  # no code in it
    again = method.load_from_checkpoint(tmp_path / "x.ckpt")
    assert again.optim == module.optim
    for name, value in module.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@some_methods
def test_probes_learn_from_the_features_of_training(method: type[SSLModule], tmp_path: Path) -> None:
    probe = LinearProbe()
    running = trainer(tmp_path, callbacks=[probe])
    running.fit(small(method), data(method))
    assert probe.head is not None
    assert probe.head[1].weight.any()
    assert "val/linear_top1" in running.callback_metrics


@some_methods
def test_validation_changes_nothing(method: type[SSLModule], tmp_path: Path) -> None:
    module = small(method)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer(tmp_path).validate(module, data(method), verbose=False)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@some_methods
def test_a_new_model_is_not_far_above_its_chance_loss(method: type[SSLModule], tmp_path: Path) -> None:
    module = small(method)
    running = trainer(tmp_path, limit_train_batches=1)
    running.fit(module, data(method))
    if module.chance_loss is not None:
        assert float(running.callback_metrics["train/loss"]) < module.chance_loss + 2 * abs(module.chance_loss)


@pytest.mark.parametrize(
    ("method", "name"),
    slow_unless(
        lambda method, _: method is SimCLR,
        [
            (method, name)
            for method in METHODS
            for name in ("resnet50", "resnet18", "resnet18_cifar", "vit_tiny_patch16_224")
            if method not in VIT_ONLY and (name == "resnet50" or method is SimCLR)
        ],
    ),
)
def test_backbones_of_all_kinds_train(method: type[SSLModule], name: str) -> None:
    larger = {"patch_size": 16} if method is Jigsaw else {}
    module = met(small(method, {"backbone": name, "backbone_kwargs": {}}, larger), 4)
    views = [torch.rand(4, 3, 64, 64) for _ in range(2)] + [torch.rand(4, 3, 16, 16)] * method.local_views
    loss = module.training_loss(views)
    loss.backward()
    assert torch.isfinite(loss)


@some_methods
def test_what_an_interrupted_step_left_behind_is_forgotten(method: type[SSLModule], tmp_path: Path) -> None:
    broken = True

    class Mended(method):  # type: ignore[misc,valid-type]
        def training_loss(self, views: list[Tensor]) -> Tensor:
            loss = super().training_loss([view * float("nan") for view in views] if broken else views)
            return loss * float("nan") if broken else loss

    module = small(Mended)
    with pytest.raises(UserError, match="loss is nan at step 0"):
        trainer(tmp_path).fit(module, data(method))
    broken = False
    for buffer in module.modules():
        if isinstance(buffer, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
            buffer.reset_running_stats()
    trainer(tmp_path, limit_train_batches=2).fit(module, data(method))
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())


@some_methods
def test_a_module_can_be_pickled_and_copied(method: type[SSLModule]) -> None:
    module = small(method)
    for again in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in module.state_dict().items())


def _recorded(rank: int, processes: int, method: type[SSLModule], net: dict[str, Any]) -> check.Recorded:
    """Five optimizer steps, 16 images per global batch."""
    torch.manual_seed(0)
    queue: dict[str, Any] = {"queue_length": 16, "queue_start_epoch": 0} if method is SwAV else {}
    module = small(method, net, queue, {"bn_splits": 1} if method is MoCoV2 else {}, optim=SGD)
    if method is MoCoV2:  # whose BatchNorm is to depend on the process
        for part in module.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.eval()
    source = data(method, batch_size=16 // processes)
    sync = method.batch_norm != "per_process"
    return check.recorded(module, source, processes, steps=5, sync_batchnorm=sync)


@pytest.mark.parametrize(
    ("method", "net"),
    slow_unless(lambda method, net: method is SimCLR and not net, [*CNN_AND_VIT, (DINO, LORA), (MAE, LORA)]),
)
def test_two_processes_train_as_one(method: type[SSLModule], net: dict[str, Any]) -> None:
    one, two = run_processes(_recorded, 1, 1, method, net)[0], run_processes(_recorded, 2, 2, method, net)
    differences = check.differences(two, one)
    assert {"losses", "gradients of backbone", "parameters of backbone"} <= differences.keys()
    assert all(difference < 1e-9 for difference in differences.values()), differences
    assert len(one["losses"][""]) == 5


# What cannot be trained is refused before training starts


@pytest.mark.parametrize(
    ("method", "options", "possible"),
    [
        (SimCLR, {"temperature": 0.0}, "above 0"),
        (SwAV, {"epsilon": -0.05}, "above 0"),
        (MoCoV2, {"momentum": 1.5}, "from 0 to 1"),
        (DINO, {"drop_path": 1.0}, "from 0 to below 1"),
        (MAE, {"probe_every": 0}, "of 1 or more"),
        (MoCoV2, {"queue_length": -5}, "of 0 or more"),
    ],
)
def test_options_out_of_range_are_refused(method: type[SSLModule], options: dict[str, Any], possible: str) -> None:
    ((name, value),) = options.items()
    with pytest.raises(UserError, match=rf"--model.{name} {value}: give a number {possible}\."):
        small(method, **options)


def test_names_of_ranges_are_those_of_options() -> None:
    known = {name for method in METHODS for name in inspect.signature(method.__init__).parameters}
    assert {name for _, names in _OF_METHODS.values() for name in names.split()} <= known


@pytest.mark.parametrize("options", [{"decoder_dim": 30}, {"decoder_dim": 36, "decoder_heads": 5}])
def test_widths_that_the_heads_do_not_divide_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"give a width that 4 and the heads divide"):
        small(MAE, **options)


@pytest.mark.parametrize(
    ("method", "views", "message"),
    [
        *(
            (method, [ViewSpec(size=32)], "needs 2 views of full size")
            for method in METHODS
            if method.global_views == 2
        ),
        *(
            (method, [ViewSpec(size=32, count=2)], f"{method.__name__} needs 1 view of full size, and no others")
            for method in METHODS
            if method.global_views == 1
        ),
        (MoCoV2, [ViewSpec(size=32, count=2), ViewSpec(size=16)], "needs 2 views of full size, and no others"),
        (
            SwAV,
            [ViewSpec(size=16), ViewSpec(size=32, count=2)],
            "smaller ones may follow; --data.views or --data.transform gives 16 px, 32",
        ),
    ],
)
def test_views_that_do_not_fit_are_refused(method: Any, views: list[ViewSpec], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        trainer(tmp_path).fit(small(method), FakeData(batch_size=8, views=views))


@every_method
def test_patches_that_do_not_divide_the_crops_are_refused(method: type[SSLModule], tmp_path: Path) -> None:
    views = [ViewSpec(size=20, count=method.global_views or 1)]
    with pytest.raises(UserError, match=r"patches of 8 px do not divide views of 20 px; set --data.image_size"):
        trainer(tmp_path).fit(small(method, VIT), FakeData(batch_size=8, views=views))


@every_method
def test_a_batch_of_one_is_refused_from_any_loader(method: type[SSLModule], tmp_path: Path) -> None:
    batch = ([torch.rand(1, 3, 32, 32)] * (method.global_views or 1), torch.zeros(1))
    loader = torch.utils.data.DataLoader([batch] * 2, batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="batch_size to 2 or more"):
        trainer(tmp_path).fit(small(method), loader)


@pytest.mark.parametrize("method", [m for m in METHODS if m.__name__ in ("BYOL", "DINO", "MoCoV2", "MoCoV3")])
def test_a_teacher_in_half_precision_is_refused(method: type[SSLModule], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="precision to bf16-mixed"):
        trainer(tmp_path, precision="bf16-true").fit(small(method), data(method))


def test_backbones_with_other_patches_train() -> None:
    for name in ("xcit_nano_12_p16_224", "pvt_v2_b0"):
        small(ssl_lightning.SimCLR, {"backbone": name, "backbone_kwargs": {}}).check([32, 32], 8)
