"""Going on from other weights: what stands still, for how long, and what then moves."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from ssl_lightning import (
    BYOL,
    DINO,
    MAE,
    DINOv2,
    ForgettingAlarm,
    GramAnchoring,
    KNNProbe,
    MoCoV3,
    Optim,
    SimCLR,
    SSLModule,
    UserError,
)
from ssl_lightning.backbones import inflate_channels
from ssl_lightning.checkpoints import open_backbone
from ssl_lightning.continued import Continued, what_trains
from ssl_lightning.schedules import cosine
from tests.small import BACKBONE, VIT, data, digits, slow_unless, small, trainer
from tests.test_init_from import saved

STAGES: dict[str, Any] = {"frozen_steps": 3, "ramp_steps": 2}
DECAYING = Optim("adamw", 1e-2, lr_scaling="none", weight_decay=0.1, end_weight_decay=0.4, warmup_epochs=0)
SLOW_START = dataclasses.replace(DECAYING, warmup_epochs=1)  # of 8 steps, one more than both stages


class Watch(L.Callback):
    """The states of backbones before each step and after the last, and rates and decays by step."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.groups: list[list[dict[str, Any]]] = []

    def _look(self, pl_module: Any) -> None:
        parts = {name: part for name, part in pl_module.named_children() if name.endswith("backbone")}
        whole = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
        self.states.append({name: value.clone() for name, value in whole.items()})

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._look(pl_module)

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        kept = ("lr", "lr_scale", "weight_decay", "waits", "decayed")
        self.groups.append([{key: group[key] for key in kept} for group in optimizer.param_groups])

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._look(pl_module)

    def moved(self, step: int) -> set[str]:
        """Names of what a step changed."""
        before, after = self.states[step : step + 2]
        return {name for name, value in after.items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize(
    ("method", "net"),
    slow_unless(
        lambda method, _: method is DINOv2,
        [
            *((method, VIT) for method in (DINOv2, GramAnchoring, DINO, MAE, MoCoV3)),
            *((method, {}) for method in (BYOL, DINO, SimCLR)),
        ],
    ),
)
def test_backbone_and_teacher_stand_still_until_their_step(
    method: type[SSLModule], net: dict[str, Any], tmp_path: Path
) -> None:
    source = saved(tmp_path, method, net)
    weights = open_backbone(source).backbone.state_dict()
    watch = Watch()
    module = small(method, net, init_from=source, continued=STAGES, optim=DECAYING)
    heads = {name: p.clone() for name, p in module.named_parameters() if not name.partition(".")[0].endswith("bone")}
    running = trainer(tmp_path, max_epochs=2, limit_train_batches=10, accumulate_grad_batches=2, callbacks=[watch])
    running.fit(module, data(method))
    backbones = {name.partition(".")[0] for name in watch.states[0]} - {"gram_backbone"}
    for name, value in weights.items():  # statistics of BatchNorm as well
        assert all(torch.equal(watch.states[6][f"{backbone}.{name}"], value) for backbone in backbones), name
    assert not any(watch.moved(step) for step in range(6))
    moving = {name for name, p in module.named_parameters() if p.requires_grad and name.startswith("backbone.")}
    assert moving <= {name for step in (7, 9) for name in watch.moved(step)}
    assert not heads or any(not torch.equal(module.state_dict()[name], value) for name, value in heads.items())
    if not net:
        assert any("running_mean" in name for name in watch.moved(6))


def test_rates_and_decay_ramp_up_and_the_cosine_begins_after(tmp_path: Path) -> None:
    source = saved(tmp_path, DINOv2, VIT)
    watch = Watch()
    module = small(
        DINOv2,
        VIT,
        {"init_from": source, "layer_decay": 0.5, "optim": SLOW_START},
        continued={**STAGES, "ramp_steps": 4, "patch_embed_lr": 0.1, "heads_lr": 10.0},
    )
    trainer(tmp_path, max_epochs=2, callbacks=[watch]).fit(module, data(DINOv2))
    stages = what_trains(module, 16)["stages"]
    assert stages == "the heads for 3 steps, then the backbone, its rate rising for 4"

    def rates(waits: bool) -> list[float]:
        return [max(group["lr"] for group in groups if bool(group["waits"]) is waits) / 1e-2 for groups in watch.groups]

    body, heads = rates(waits=True), rates(waits=False)
    assert body[:8] == pytest.approx([0, 0, 0, 0.25, 0.5, 0.75, 1, 1])
    assert heads[:8] == pytest.approx([0, 10 / 8, 20 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8])
    assert body[8:] == heads[8:] == pytest.approx([cosine(1, 0, step / 8) for step in range(8)])
    decays = [{g["weight_decay"] for g in groups if g["waits"] and g["decayed"]} for groups in watch.groups]
    assert decays[:3] == [{0.0}] * 3
    assert decays[3] == {DECAYING.weight_decay_at(3 / 16)}
    scales = {round(group["lr_scale"], 6) for group in watch.groups[0] if group["waits"]}
    assert scales == {1.0, 0.5, 0.25, 0.125, 0.0125}  # norm, blocks, tokens, patches


def test_last_blocks_join_before_the_rest_and_all_then_has_a_lower_rate(tmp_path: Path) -> None:
    watch = Watch()
    continued = {"frozen_steps": 2, "ramp_steps": 2, "last_blocks": 1, "last_blocks_steps": 3, "all_lr": 0.5}
    module = small(
        DINOv2, VIT, init_from=saved(tmp_path, DINOv2, VIT), continued=continued, layer_decay=1.0, optim=DECAYING
    )
    trainer(tmp_path, max_epochs=2, callbacks=[watch]).fit(module, data(DINOv2))
    assert what_trains(module, 16)["stages"] == (
        "the heads for 2 steps, then the last 1 block for 3, then the backbone, its rate rising for 2"
    )
    moved = [{name.removeprefix("backbone.") for name in watch.moved(step)} for step in range(8)]
    assert not moved[0] | moved[1]
    last = {name for name in moved[2] | moved[4] if not name.startswith("teacher_")}
    assert last <= {f"blocks.1.{name}" for name, _ in module.backbone.blocks[1].named_parameters()} | {
        "norm.weight",
        "norm.bias",
    }
    assert len(last) > 8
    assert {"cls_token", "blocks.0.mlp.fc1.weight"} <= moved[5]
    rates = [
        [max(group["lr"] for group in groups if group["waits"] == stage) / 1e-2 for groups in watch.groups[:8]]
        for stage in (0, 1, 2)
    ]
    after = 0.5 * cosine(1, 0, 0)
    assert rates[0][:7] == pytest.approx([1] * 5 + [after] * 2)
    assert rates[1][:7] == pytest.approx([0, 0, 0.5, 1, 1, after, after])
    assert rates[2][:7] == pytest.approx([0] * 5 + [after / 2, after])


def test_a_continued_run_that_forgets_is_reported_once(tmp_path: Path) -> None:
    source = saved(tmp_path, SimCLR, VIT)
    messages, alarms = [], []
    for rate in (0.0, 1.0):
        alarm = ForgettingAlarm()
        optim = dataclasses.replace(DECAYING, base_lr=rate)
        module = small(SimCLR, VIT, init_from=source, continued={"frozen_steps": 0}, optim=optim)
        images = digits(num_workers=0)
        running = trainer(tmp_path, max_epochs=2, limit_train_batches=4, callbacks=[KNNProbe(k=5), alarm])
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            running.fit(module, images)
        messages.append([str(w.message) for w in warned if "ForgettingAlarm" in str(w.message)])
        alarms.append(alarm)
    assert messages[0] == []
    assert len(messages[1]) == 1
    assert "kNN fell from" in messages[1][0]
    assert alarms[1].raised


@pytest.mark.parametrize(
    ("given", "steps", "stages"),
    [
        ({}, 25_000, (2500, 0, 1000)),
        ({}, 5000, (1000, 0, 200)),
        ({}, 1000, (400, 0, 100)),
        ({}, 50, (20, 0, 30)),
        ({"frozen_steps": 0}, 1000, (0, 0, 0)),
        ({"last_blocks": 1}, 25_000, (2500, 1250, 1000)),
        ({"last_blocks": 1, "last_blocks_steps": 5, "frozen_steps": 0}, 1000, (0, 5, 100)),
        ({"frozen_steps": 7, "ramp_steps": 2}, 1000, (7, 0, 2)),
        ({"frozen_steps": 7, "ramp_steps": 2}, float("inf"), (7, 0, 2)),
    ],
)
def test_stages_have_lengths_of_their_own(given: Any, steps: float, stages: tuple[int, ...]) -> None:
    assert Continued(**given).stages(steps) == stages


@pytest.mark.slow
def test_a_run_stopped_in_the_ramp_resumes_bit_for_bit(tmp_path: Path) -> None:
    source = saved(tmp_path, BYOL)

    def run(steps: int, ckpt_path: Any = None) -> dict[str, Tensor]:
        L.seed_everything(1)
        module = small(BYOL, init_from=source, continued={"frozen_steps": 2, "ramp_steps": 3}, optim=DECAYING)
        running = trainer(tmp_path, max_epochs=2, limit_train_batches=3, limit_val_batches=0)
        if ckpt_path is None:
            running.callbacks.append(Save(steps, tmp_path))
        running.fit(module, data(BYOL), ckpt_path=ckpt_path)
        return module.state_dict()

    for steps in (1, 3):
        whole, resumed = run(steps), run(steps, tmp_path / f"{steps}.ckpt")
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


class Save(L.Callback):
    """Saves after some steps."""

    def __init__(self, steps: int, folder: Path) -> None:
        self.steps, self.folder = steps, folder

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.steps:
            trainer.save_checkpoint(self.folder / f"{self.steps}.ckpt")


@pytest.mark.parametrize(("method", "net"), slow_unless(lambda _, net: not net, [(SimCLR, {}), (MoCoV3, VIT)]))
def test_new_channels_train_from_the_first_step(method: type[SSLModule], net: dict[str, Any], tmp_path: Path) -> None:
    source = saved(tmp_path, method, net)
    weights = open_backbone(source).backbone.state_dict()
    first = "patch_embed.proj.weight" if net else "conv1.weight"
    channels = {"backbone_kwargs": {**{**BACKBONE, **net}["backbone_kwargs"], "in_chans": 5}}
    watch = Watch()
    continued = {**STAGES, "train_patch_embed": True}
    module = small(method, net, channels, init_from=source, continued=continued)
    views = [torch.rand(8, 5, 32, 32) for _ in range(2)]
    loader = torch.utils.data.DataLoader([(views, torch.zeros(8))] * 4, batch_size=None)  # type: ignore[arg-type]
    trainer(tmp_path, callbacks=[watch]).fit(module, loader)
    expected = inflate_channels(weights[first], 5)
    assert torch.equal(watch.states[0][f"backbone.{first}"], expected)
    same = torch.rand(1, 1, 32, 32)
    convolved = [torch.nn.functional.conv2d(same.expand(-1, w.shape[1], -1, -1), w) for w in (weights[first], expected)]
    torch.testing.assert_close(*convolved)  # equal channels give what they gave
    moved = {name for name in watch.moved(0) if name.startswith("backbone.")}
    assert moved == {f"backbone.{name}" for name in weights if name.startswith(first.removesuffix("weight"))}


def test_what_cannot_go_on_is_refused_before_training(tmp_path: Path) -> None:
    source, other = saved(tmp_path, SimCLR), saved(tmp_path, SimCLR, name="other.ckpt")
    with pytest.raises(UserError, match=r"set --model.init_from"):
        small(SimCLR, continued={})

    class Own(SimCLR):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    for method, continued, message, options in (
        (SimCLR, {"frozen_steps": 8}, "frozen_steps 8: the training has 8 steps, so its backbone would never", {}),
        (SimCLR, {}, "no end to take shares of; set --model.continued.frozen_steps", {"max_epochs": -1}),
        (SimCLR, {"ramp_steps": -1}, "--model.continued.ramp_steps -1 must be at least 0", {}),
        (SimCLR, {"last_blocks": 0}, "--model.continued.last_blocks 0 must be at least 1", {}),
        (SimCLR, {"last_blocks": 1}, "--model.continued.last_blocks: the backbone has no blocks", {}),
        (Own, {}, r"configure_optimizers must return self.optim.configure", {}),
    ):
        running = trainer(tmp_path, **options)
        with pytest.raises(UserError, match=message):
            running.fit(small(method, init_from=source, continued=continued), data(SimCLR))
        assert running.global_step == 0, message
    for module, message in (
        (small(SimCLR, init_from=source), "init_from .*source.ckpt is not read where --ckpt_path resumes"),
        (small(SimCLR, init_from=source, continued={}), "init_from"),
        (small(SimCLR, trainable="norms"), "model.trainable differs from the training that --ckpt_path resumes"),
    ):
        with pytest.raises(UserError, match=message):
            trainer(tmp_path).fit(module, data(SimCLR), ckpt_path=other)
