"""RotNet: rotations and their labels, probes, and whole steps against a plain restatement."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lightning import FakeData, LinearProbe, Optim, RotNet
from ssl_lightning.data.augment import flip
from ssl_lightning.methods.rotnet import rotations
from tests.oracle import Weights, compare, linear, parameters, random_views, run, sgd
from tests.small import small, trainer


def test_head_and_defaults_are_the_papers() -> None:
    method = RotNet()
    assert parameters(method) == 23_508_032 + 2048 * 4 + 4
    assert method.chance_loss == pytest.approx(1.3863, abs=1e-4)
    assert (method.optim.peak_lr(256), method.optim.weight_decay) == (0.1, 1e-4)
    steps = [0, 29, 30, 59, 60, 89, 90, 99, 100, 104]  # one a epoch
    factors = [method.optim.lr_factor(step, 105, 1) for step in steps]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3, 1e-4, 1e-4])


def test_rotations_are_counter_clockwise_as_in_the_worked_example() -> None:
    rotated, turns = rotations(torch.tensor([[0.0, 1.0], [2.0, 3.0]])[None, None])
    assert turns.tolist() == [0, 1, 2, 3]
    assert rotated[:, 0].tolist() == [[[0, 1], [2, 3]], [[1, 3], [0, 2]], [[3, 2], [1, 0]], [[2, 0], [3, 1]]]
    assert torch.equal(rotations(rotated[1:2])[0][3], rotated[0])  # a quarter and three make a whole turn


def test_rotations_and_labels_of_an_image_lie_side_by_side() -> None:
    images = torch.rand(3, 3, 4, 4)
    rotated, turns = rotations(images)
    assert turns.tolist() == [0, 1, 2, 3] * 3
    for row, turn in enumerate(turns.tolist()):
        expected = np.rot90(images[row // 4].numpy(), turn, (1, 2))
        np.testing.assert_array_equal(rotated[row].numpy(), expected)


def test_mirroring_would_swap_the_quarter_turns_so_it_comes_first() -> None:
    image = torch.rand(1, 3, 4, 4)
    left, _, right = rotations(image)[0][1:].unbind()
    assert torch.equal(flip(left), rotations(flip(image))[0][3])  # the mirror image of a left turn is a right turn
    assert torch.equal(flip(right), rotations(flip(image))[0][1])


def test_the_method_rotates_finished_views() -> None:
    method = small(RotNet)
    seen: list[Tensor] = []
    method.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    view = torch.rand(2, 3, 16, 16)
    method.training_loss([view])
    assert torch.equal(seen[0][::4], view)  # the upright ones are the views themselves


def test_probes_learn_from_upright_images(tmp_path: Any) -> None:
    calls = 0

    class Recorder(LinearProbe):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            nonlocal calls
            calls += 1
            features, labels = outputs["features"], batch[1]
            assert len(features) == len(labels)
            pl_module.eval()
            torch.testing.assert_close(features, pl_module(batch[0][0]), atol=1e-4, rtol=1e-3)
            pl_module.train()
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    vit: dict[str, Any] = {  # the same in train and eval mode
        "backbone": "vit_tiny_patch16_224",
        "backbone_kwargs": {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 3},
    }
    method = small(RotNet, vit, optim=Optim("sgd", base_lr=0.0, warmup_epochs=0))
    trainer(tmp_path, callbacks=[Recorder()]).fit(method, FakeData(batch_size=8))
    assert calls == 8


def test_accuracy_is_that_of_the_rotations() -> None:
    method = small(RotNet).eval()
    images = torch.rand(8, 3, 16, 16)
    rotated, turns = rotations(images)
    told = method.head(method.backbone(rotated)).argmax(1) == turns
    assert float(method.health([images])["pretext_accuracy"]) == pytest.approx(float(told.float().mean()))
    with torch.no_grad():
        method.head.weight.zero_(), method.head.bias.zero_()
    assert method.training_loss([images]).item() == pytest.approx(math.log(4))


def test_whole_steps_equal_a_plain_restatement() -> None:
    torch.manual_seed(0)
    method = small(RotNet, optim=Optim("sgd", base_lr=0.1, weight_decay=1e-4)).double()

    def loss_of(weights: Weights, views: list[Tensor]) -> Tensor:
        images = [image.transpose(1, 2).flip(1) for image in views[0]]  # a quarter turn
        batch: list[Tensor] = []
        for image, left in zip(views[0], images, strict=True):
            batch += [image, left, image.flip(1, 2), image.flip(1).transpose(1, 2)]
        logits = linear(run(method.backbone, weights, "backbone.", torch.stack(batch)), weights, "head")
        return -torch.stack([F.log_softmax(row, 0)[index % 4] for index, row in enumerate(logits)]).mean()

    def update(name: str, p: Tensor, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        return sgd(0.1, 1e-4 if p.ndim > 1 else 0.0)(name, p, gradient, state)

    compare(method, loss_of, update, random_views(3, 16))
