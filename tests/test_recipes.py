"""Recipes after released code: what their learning rates and weight decays come to."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from ssl_lightning import LARS, Optim

CONFIGS = Path(__file__).parents[1] / "configs"


def arguments(recipe: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / recipe).read_text())["model"]["init_args"]


def test_barlow_twins_recipe_moves_as_the_released_code_whose_gradient_is_divided_by_the_devices() -> None:
    devices, batch = 32, 2048
    ours, theirs = nn.Linear(6, 4), nn.Linear(6, 4)
    theirs.load_state_dict(ours.state_dict())
    recipe = Optim("lars", base_lr=0.2, **arguments("barlow_twins/imagenet_resnet50.yaml")["optim"])
    optimizer = recipe.create(ours, batch)
    peak = batch / 256
    groups = [{"params": theirs.weight, "lr": 0.2 * peak}, {"params": theirs.bias, "lr": 0.0048 * peak}]
    released = LARS(groups, lr=0.2, weight_decay=1e-6)
    for _ in range(3):
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn_like(mine) * 1e-3  # small enough for the decay to count
            other.grad = mine.grad / devices
        optimizer.step()
        released.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


def test_gram_anchorings_rate_is_the_released_one() -> None:
    optim = arguments("gram_anchoring/imagenet_vit_large.yaml")["optim"]
    for batch in (1024, 2048, 4096):  # theirs is multiplied by 4 sqrt(B / 1024)
        assert Optim("adamw", **optim).peak_lr(batch) == pytest.approx(3e-5 * 4 * (batch / 1024) ** 0.5)


@pytest.mark.parametrize("recipe", ["imagenet_resnet50", "cifar10_resnet18"])
def test_simclrs_recipes_sum_over_views_and_have_the_scripts_three_layers(recipe: str) -> None:
    chosen = arguments(f"simclr/{recipe}.yaml")
    assert (chosen["reduction"], chosen["projector_layers"]) == ("sum", 3)


def test_simmims_swin_has_the_rates_of_the_released_schedule() -> None:
    optim = Optim("adamw", **{"warmup_start_factor": 0.005, **arguments("simmim/imagenet_swin_base.yaml")["optim"]})
    batch, steps = 2048, 100
    rates = [optim.peak_lr(batch) * optim.lr_factor(step, steps, 1) for step in (0, 9, 10, 50, 100)]
    scale = batch / 512
    expected = [1e-6, 1e-6 + 0.9 * 199e-6, 1e-5 + 1.9e-4 * 0.9755283, 1.05e-4, 1e-5]  # the peak is never reached
    assert rates == pytest.approx([rate * scale for rate in expected], rel=1e-5)
