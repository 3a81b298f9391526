"""LARS against worked examples and a plain restatement; recipes against torch's optimizers."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from timm.optim import get_optimizer_class, muon
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_lightning import LARC, LARS, LastCheckpoint, Optim, SimCLR, UserError
from ssl_lightning.optim import _optimizer_class
from ssl_lightning.schedules import cosine
from tests.small import ADAMW, data, simclr, trainer


def steps(
    gradients: list[list[float]], lrs: list[float], p: list[float], optimizer_class: type[LARS] = LARS, **kwargs: object
) -> torch.Tensor:
    weight = nn.Parameter(torch.tensor([p], dtype=torch.float64))
    optimizer = optimizer_class([weight], lr=lrs[0], **kwargs)  # type: ignore[arg-type]
    for gradient, lr in zip(gradients, lrs, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
    return weight.detach()[0]


@pytest.mark.parametrize(
    ("lr_in_momentum", "expected"), [(True, [2.99422806, 3.98990354]), (False, [2.99557806, 3.99170354])]
)
def test_lars_two_steps_of_the_worked_example(lr_in_momentum: bool, expected: list[float]) -> None:
    kwargs = {"weight_decay": 0.01, "momentum": 0.9, "trust_coefficient": 0.001, "lr_in_momentum": lr_in_momentum}
    first = steps([[0.6, 0.8]], [1.0], [3.0, 4.0], **kwargs)
    assert first.tolist() == pytest.approx([2.997, 3.996], abs=1e-8)
    second = steps([[0.6, 0.8], [0.0, 1.0]], [1.0, 0.5], [3.0, 4.0], **kwargs)
    assert second.tolist() == pytest.approx(expected, abs=1e-8)


def test_lars_uses_the_norm_of_the_sum_of_gradient_and_decay() -> None:
    moved = steps([[0.6, 0.8]], [1.0], [4.0, -3.0], weight_decay=0.01)
    q = 0.00499376
    assert moved.tolist() == pytest.approx([4 - q * (0.6 + 0.04), -3 - q * (0.8 - 0.03)], abs=1e-8)


def test_larc_of_the_worked_example() -> None:
    moved = steps([[0.6, 0.8], [0.0, 1.0]], [1.0, 0.5], [3.0, 4.0], LARC, weight_decay=0.01)
    assert moved.tolist() == pytest.approx([2.99557871, 3.99172626], abs=1e-8)
    moved = steps([[0.6, 0.8]], [1.0], [4.0, -3.0], LARC, weight_decay=0.01)  # the sum of norms, not norm of the sum
    q = 0.0047619
    assert moved.tolist() == pytest.approx([4 - q * (0.6 + 0.04), -3 - q * (0.8 - 0.03)], abs=1e-7)


def test_larc_adapts_vectors_too_and_decays_nothing_without_gradient() -> None:
    assert steps([[0.0, 0.0]], [1.0], [3.0, 4.0], LARC, weight_decay=0.01).tolist() == [3.0, 4.0]
    bias = nn.Parameter(torch.tensor([3.0, 4.0]))
    bias.grad = torch.tensor([0.6, 0.8])
    LARC([bias], lr=1.0, weight_decay=0.01).step()
    assert bias.tolist() == pytest.approx([2.997, 3.996])


def test_lars_of_zero_norms_takes_the_plain_gradient() -> None:
    assert steps([[0.6, 0.8]], [1.0], [0.0, 0.0], weight_decay=0.1).tolist() == pytest.approx([-0.6, -0.8])
    assert steps([[0.0, 0.0]], [1.0], [3.0, 4.0]).tolist() == [3.0, 4.0]
    assert steps([[0.0, 0.0]], [1.0], [3.0, 4.0], weight_decay=0.01).tolist() == pytest.approx([2.997, 3.996])


def test_lars_neither_decays_nor_adapts_vectors() -> None:
    bias = nn.Parameter(torch.ones(3))
    bias.grad = torch.full((3,), 0.5)
    LARS([bias], lr=0.1, weight_decay=10.0).step()
    torch.testing.assert_close(bias.detach(), torch.full((3,), 0.95))


def test_lars_state_survives_a_checkpoint() -> None:
    def trained(reload: bool) -> torch.Tensor:
        torch.manual_seed(0)
        layer = nn.Linear(4, 3)
        optimizer = LARS(layer.parameters(), lr=0.5, weight_decay=0.1)
        for step in range(4):
            if reload and step == 2:
                state = optimizer.state_dict()
                optimizer = LARS(layer.parameters(), lr=9.0)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            layer(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
        return layer.weight.detach()

    assert torch.equal(trained(False), trained(True))


def test_schedules() -> None:
    assert [cosine(1.0, 0.0, progress) for progress in (0, 0.5, 1, 2)] == pytest.approx([1, 0.5, 0, 0])
    # 4 epochs of 2 steps with one epoch of warm-up: the form of MAE and MoCo v3
    expected = [0, 0.5, 1, 0.933013, 0.75, 0.5, 0.25, 0.066987]
    assert [Optim(warmup_epochs=1).lr_factor(step, 8, 2) for step in range(8)] == pytest.approx(expected, abs=1e-6)


def test_a_cosine_may_count_from_the_first_step_as_timms() -> None:
    optim = Optim(base_lr=1.0, warmup_epochs=10, warmup_start_factor=0.005, end_lr_factor=0.05, cosine_from_start=True)
    theirs = CosineLRScheduler(
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0),
        t_initial=500, lr_min=0.05, warmup_t=50, warmup_lr_init=0.005, cycle_limit=1, t_in_epochs=False,
    )  # fmt: skip
    expected = [theirs._get_lr(step)[0] for step in range(500)]
    ours = [optim.lr_factor(step, 500, 5) for step in range(500)]
    assert ours == pytest.approx(expected)
    later = [replace(optim, cosine_from_start=False).lr_factor(step, 500, 5) for step in range(500)]
    assert sum(later) / sum(ours) == pytest.approx(1.1, abs=0.01)


def test_the_rate_may_stay_at_the_peak_before_it_decays() -> None:
    expected = [0, 0.5, 1, 1, 1, 0.75, 0.25]
    for start in (2.0, 4 / 7):  # epochs of two steps, or a share of the training
        optim = Optim(warmup_epochs=1, decay_start=start)
        factors = [optim.lr_factor(step, 7, 2) for step in range(7)]
        assert factors == pytest.approx(expected, abs=1e-6)
    assert Optim(warmup_epochs=0, decay_start=9).lr_factor(7, 8, 2) == 1
    for wrong, message in (
        ({"decay_start": -1}, "give an epoch, or a share below 1"),
        ({"decay_start": 0.5, "milestones": (0.5,)}, r"set --model.optim.milestones to \[\]"),
        ({"decay_start": 0.5, "cosine_from_start": True}, "set --model.optim.cosine_from_start to false"),
    ):
        with pytest.raises(UserError, match=message):
            Optim(**wrong)  # type: ignore[arg-type]


def test_a_short_decay_branched_off_a_stable_run_is_a_run_planned_that_way(tmp_path: Path) -> None:
    def run(epochs: int, decay_start: float, ckpt_path: Path | None = None) -> tuple[dict[str, torch.Tensor], float]:
        L.seed_everything(1)
        keep = LastCheckpoint(keep_epochs=[2], dirpath=str(tmp_path / f"{epochs}"))
        optim = replace(ADAMW, warmup_epochs=1, decay_start=decay_start, end_lr_factor=0.01)
        method = simclr(optim=optim)
        running = trainer(tmp_path, max_epochs=epochs, callbacks=[keep], enable_checkpointing=True)
        running.fit(method, data(SimCLR, num_workers=0), ckpt_path=ckpt_path)
        return method.state_dict(), running.optimizers[0].param_groups[0]["lr"]

    planned, last_rate = run(3, 2)
    _, stable_rate = run(4, 4)
    with pytest.warns(
        UserWarning, match=r"other hyper-parameters than the checkpoint's: optim.decay_start 2 \(was 4\)"
    ):
        branched, _ = run(3, 2, tmp_path / "4" / "epoch_2.ckpt")
    assert all(torch.equal(value, branched[name]) for name, value in planned.items())
    assert last_rate == pytest.approx(0.01 * ADAMW.base_lr)
    assert stable_rate == ADAMW.base_lr


@pytest.mark.parametrize(
    ("scaling", "base", "batch", "peak"),
    [("linear", 0.3, 4096, 4.8), ("sqrt", 0.075, 512, 1.697), ("none", 2.0, 64, 2)],
)
def test_learning_rate_follows_the_global_batch(scaling: str, base: float, batch: int, peak: float) -> None:
    optim = Optim(base_lr=base, lr_scaling=scaling)  # type: ignore[arg-type]
    assert optim.peak_lr(batch) == pytest.approx(peak, abs=1e-3)


def test_norms_and_biases_are_not_decayed_unless_asked() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    decayed, undecayed = Optim("sgd", weight_decay=0.1).create(module, 256).param_groups
    assert [p.ndim for p in decayed["params"]] == [4, 2]
    assert [p.ndim for p in undecayed["params"]] == [1, 1, 1, 1]
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.1, 0.0)
    (everything,) = Optim("sgd", weight_decay=0.1, decay_norm_and_bias=True).create(module, 256).param_groups
    assert len(everything["params"]) == 6


def test_frozen_parameters_are_in_no_group() -> None:
    module = nn.Linear(3, 2)
    module.weight.requires_grad_(False)
    (group,) = Optim("adamw").create(module, 256).param_groups
    assert group["params"] == [module.bias]


@pytest.mark.parametrize("name", ["lars", "LARS", "sgd", "AdamW", "lamb", "lion", "muon"])
def test_optimizers_of_torch_and_timm_by_name(name: str) -> None:
    module = nn.Conv2d(3, 3, 1)
    before = module.weight.detach().clone()
    optimizer = Optim(name, base_lr=0.1, lr_scaling="none").create(module, 256)
    module(torch.ones(2, 3, 1, 1)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, module.weight)


class Dtypes(TorchDispatchMode):
    """Notes the dtypes that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen |= {result.dtype} if isinstance(result, Tensor) else set()
        return result


def _three_steps(build: Callable[..., Any], shapes: Sequence[tuple[int, ...]]) -> tuple[Tensor, set[torch.dtype]]:
    """Weights after three steps, and the types of all tensors on the way."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = build(weights, lr=0.1)
    with Dtypes() as dtypes:
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn(weight.shape)  # of full rank: there is nothing to round to
            optimizer.step()
    return torch.cat([weight.detach().flatten() for weight in weights]), dtypes.seen


@pytest.mark.parametrize("name", ["muon", "nmuon", "adamuon"])
def test_muon_is_timms_in_float32(name: str) -> None:
    shapes = ((8, 3, 3, 3), (4, 32), (8, 8))
    ours, dtypes = _three_steps(_optimizer_class(name), shapes)
    theirs, of_timm = _three_steps(get_optimizer_class(name, bind_defaults=True), shapes)
    assert torch.bfloat16 in of_timm - dtypes
    assert not torch.equal(ours, theirs)
    torch.testing.assert_close(ours, theirs, atol=3e-3, rtol=0)  # three steps of up to 0.1, rounded to 8 bits


@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (64, 64), (16, 32, 3, 3)])
def test_muon_in_fewer_multiplications_is_timms(shape: tuple[int, ...]) -> None:
    ours, _ = _three_steps(_optimizer_class("muon"), [shape])
    precise = partial(muon.zeropower_via_newtonschulz, dtype=torch.float64)
    with mock.patch.object(muon, "zeropower_via_newtonschulz", precise):
        theirs, _ = _three_steps(get_optimizer_class("muon", bind_defaults=True), [shape])
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)


def test_the_hooks_of_a_step_run_once_where_timms_muon_was_built_before() -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    get_optimizer_class("muon", bind_defaults=True)([weight], lr=0.1)
    optimizer, calls = Optim("muon", base_lr=0.1, lr_scaling="none").create(nn.Linear(4, 4), 256), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.step()
    assert calls == ["before", "after"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"milestones": (30, 60)}, r"milestones \[30, 60\]: give shares of the training from 0 to 1"),
        ({"end_lr_factor": -2.0}, r"end_lr_factor -2.0: give a number of 0 or more"),
        ({"base_lr": -0.1}, r"base_lr -0.1: give a number of 0 or more"),
    ],
)
def test_numbers_out_of_range_are_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"--model.optim.{message}"):
        Optim(**option)


def test_torch_comes_before_timm() -> None:
    optimizer = Optim("sgd", momentum=0.8).create(nn.Linear(2, 2), 256)
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["momentum"] == 0.8
    assert not optimizer.defaults["nesterov"]  # timm's sgd would be nesterov


def test_unknown_optimizer_and_wrong_argument_say_what_to_change() -> None:
    with pytest.raises(UserError, match=r"did you mean .*adamw"):
        Optim("adamv").create(nn.Linear(2, 2), 256)
    with pytest.raises(UserError, match=r"optim\.extra"):
        Optim("sgd", extra={"betas": [0.9, 0.95]}).create(nn.Linear(2, 2), 256)
