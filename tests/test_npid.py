"""NPID: scores, noise, memory and its checkpoints, and whole steps against a plain restatement."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_lightning import NPID, FakeData, Optim, UserError, losses
from tests.oracle import Weights, compare, linear, parameters, random_views, run, sgd, unit
from tests.processes import run_processes
from tests.small import met, small, trainer


def test_head_and_defaults_are_the_papers() -> None:
    method = NPID()
    assert parameters(method.projector) == 2048 * 128 + 128
    assert (method.temperature, method.nce_k, method.momentum, method.views) == (0.07, 4096, 0.5, "npid")
    assert method.optim.peak_lr(256) == 0.03
    assert [method.optim.lr_factor(step, 200, 1) for step in (0, 119, 120, 159, 160)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01]
    )
    method.remember(3000)
    bound = 1 / math.sqrt(128 / 3)
    assert 0.99 * bound < method.memory.rows.abs().max() <= bound
    assert method.memory.rows.mean().abs() < 1e-3


def test_nce_of_the_worked_example() -> None:
    assert losses.nce_of(torch.tensor([[0.5, 0.25, 0.25]]), 4).item() == pytest.approx(1.504077, abs=1e-5)


def test_noise_is_summed_not_averaged() -> None:
    probabilities = torch.rand(3, 5) / 10
    by_hand = []
    for own, *noise in probabilities.tolist():
        of_noise = [math.log((4 / 20) / (other + 4 / 20)) for other in noise]
        by_hand.append(-math.log(own / (own + 4 / 20)) - sum(of_noise))
    assert losses.nce_of(probabilities, 20).item() == pytest.approx(sum(by_hand) / 3, abs=1e-5)


def test_chance_is_where_all_images_are_as_likely() -> None:
    method = met(small(NPID), 4)
    assert method.chance_loss == pytest.approx(losses.nce_of(torch.full((1, 33), 1 / 8), 8).item(), abs=1e-4)
    whole = small(NPID, nce_k=0)
    assert whole.chance_loss is None
    assert met(whole, 4).chance_loss == pytest.approx(math.log(8))


def test_all_images_are_told_apart_by_a_full_softmax() -> None:
    method = met(small(NPID, nce_k=0), 4)
    views = [torch.rand(4, 3, 16, 16)]
    features = unit(method.projector(method.backbone(views[0])))
    logits = features @ method.memory.rows.T / method.temperature
    expected = -torch.stack([F.log_softmax(row, 0)[index] for index, row in enumerate(logits)]).mean()
    torch.testing.assert_close(method.training_loss(views), expected)


def test_the_memory_moves_after_the_scores() -> None:
    method = met(small(NPID, nce_k=0), 4)
    views, before = [torch.rand(4, 3, 16, 16)], method.memory.rows.clone()
    losses_of_step = [method.training_loss(views).item() for _ in range(2)]
    assert torch.equal(method.memory.rows, before)
    assert losses_of_step[0] == pytest.approx(losses_of_step[1], abs=1e-5)
    method.update_teacher()
    assert not torch.equal(method.memory.rows[:4], before[:4])
    assert torch.equal(method.memory.rows[4:], before[4:])
    assert method.training_loss(views).item() < losses_of_step[0]  # now the rows know their images
    assert not method.memory.rows.requires_grad


def test_a_row_moves_as_in_the_worked_example() -> None:
    method = small(NPID, projector_dim=2)
    method.memory.rows = torch.tensor([[0.3, 0.4], [1.0, 0.0]])
    method.defer(indices=torch.tensor([1]), features=torch.tensor([[0.0, 1.0]]), normalizer=method.normalizer)
    method.update_teacher()
    torch.testing.assert_close(method.memory.rows, torch.tensor([[0.3, 0.4], [0.707107, 0.707107]]))


def test_the_first_batch_settles_the_normaliser() -> None:
    torch.manual_seed(0)
    method = met(small(NPID), 4)
    drawn: list[Tensor] = []
    draw = method._drawn
    method._drawn = lambda images: drawn.append(draw(images)) or drawn[-1]
    views = [torch.rand(4, 3, 16, 16)]
    method.training_loss(views)
    candidates = torch.cat([torch.arange(4)[:, None], drawn[0]], dim=1)
    features = unit(method.projector(method.backbone(views[0])))
    scores = torch.stack(
        [(method.memory.rows[rows] @ f / 0.07).exp() for rows, f in zip(candidates, features, strict=True)]
    )
    method.update_teacher()
    torch.testing.assert_close(method.normalizer, 8 * scores.mean().detach())
    settled = method.normalizer.clone()
    for _ in range(2):
        method.training_loss([torch.rand(4, 3, 16, 16)])
        method.update_teacher()
    assert torch.equal(method.normalizer, settled)
    assert torch.equal(method.state_dict()["normalizer"], settled)
    assert drawn[0].shape == (4, 32)
    assert set(drawn[0].flatten().tolist()) == set(range(8))


def test_the_memory_has_a_row_for_each_training_image_and_comes_with_checkpoints(tmp_path: Any) -> None:
    images = FakeData(num_images=24, batch_size=8, seed=0)
    running = trainer(tmp_path, max_epochs=2)
    method = small(NPID)
    running.fit(method, images)
    assert method.memory.rows.shape == (24, 16)
    torch.testing.assert_close(method.memory.rows.norm(dim=1), torch.ones(24))  # each image has been seen
    running.save_checkpoint(tmp_path / "x.ckpt")
    again = NPID.load_from_checkpoint(tmp_path / "x.ckpt")
    assert torch.equal(again.memory.rows, method.memory.rows)
    assert torch.equal(again.normalizer, method.normalizer)
    trainer(tmp_path).validate(small(NPID), images, ckpt_path=tmp_path / "x.ckpt", verbose=False)
    trainer(tmp_path, max_epochs=1).fit(again, FakeData(num_images=24, batch_size=8))
    with pytest.raises(UserError, match=r"memory is of 24 images, not of 16"):
        trainer(tmp_path).fit(again, FakeData(num_images=16, batch_size=8))
    with pytest.raises(UserError, match=r"memory is of 16 images, not of 24"):
        trainer(tmp_path).fit(small(NPID), FakeData(num_images=16, batch_size=8), ckpt_path=tmp_path / "x.ckpt")


def test_rows_are_those_of_the_images_whatever_their_order(tmp_path: Any) -> None:
    method = small(NPID, momentum=0.0, optim=Optim("sgd", base_lr=0.0, warmup_epochs=0))
    seen: dict[int, Tensor] = {}

    def moved() -> None:
        indices, features = (method._deferred[name][0] for name in ("indices", "features"))
        seen.update(zip(indices.tolist(), features, strict=True))
        update()

    update, method.update_teacher = method.update_teacher, moved
    trainer(tmp_path).fit(method, FakeData(num_images=24, batch_size=8))
    assert sorted(seen) == list(range(24))
    for index, features in seen.items():
        torch.testing.assert_close(method.memory.rows[index], features)


def test_a_loader_that_tells_no_indices_is_refused(tmp_path: Any) -> None:
    loader = torch.utils.data.DataLoader([([torch.rand(4, 3, 32, 32)], torch.zeros(4))] * 2, batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="this loader does not give; train with a data module"):
        trainer(tmp_path).fit(small(NPID), loader)


def _two_processes(rank: int) -> tuple[Tensor, Tensor, float]:
    torch.manual_seed(0)
    method = small(NPID).double().eval()  # BatchNorm would tell the processes apart
    method.remember(16)
    images = torch.rand(8, 3, 16, 16, dtype=torch.float64)
    rows = slice(rank * 4, rank * 4 + 4)
    method.image_indices = (torch.arange(8) * 2)[rows]
    torch.manual_seed(1)
    loss = float(method.training_loss([images[rows]]))
    method.update_teacher()
    return method.memory.rows, method.normalizer, loss


def test_two_processes_hold_the_memory_of_one() -> None:
    (memory, normalizer, loss), (memory1, normalizer1, loss1) = run_processes(_two_processes, 2)
    assert torch.equal(memory, memory1)
    assert torch.equal(normalizer, normalizer1)
    torch.manual_seed(0)
    method = small(NPID).double().eval()
    method.remember(16)
    images = torch.rand(8, 3, 16, 16, dtype=torch.float64)
    method.image_indices = torch.arange(8) * 2
    torch.manual_seed(1)
    assert (loss + loss1) / 2 == pytest.approx(float(method.training_loss([images])), abs=1e-9)
    method.update_teacher()
    torch.testing.assert_close(method.memory.rows, memory)
    torch.testing.assert_close(method.normalizer, normalizer)


def test_whole_steps_equal_a_plain_restatement() -> None:
    torch.manual_seed(0)
    optim = Optim("sgd", base_lr=0.03, weight_decay=1e-4, decay_norm_and_bias=True)
    method = met(small(NPID, optim=optim).double(), 4)
    memory = method.memory.rows.clone()
    normalizers: list[Tensor] = []
    drawn: list[Tensor] = []
    draw = method._drawn
    method._drawn = lambda images: drawn.append(draw(images)) or drawn[-1]

    def loss_of(weights: Weights, views: list[Tensor]) -> Tensor:
        features = unit(linear(run(method.backbone, weights, "backbone.", views[0]), weights, "projector"))
        candidates = [[image, *drawn[-1][image].tolist()] for image in range(4)]
        rows = zip(features, candidates, strict=True)
        scores = torch.stack([torch.stack([(f @ memory[i].clone() / 0.07).exp() for i in some]) for f, some in rows])
        if not normalizers:
            normalizers.append(scores.mean().detach() * 8)
        p, noise = scores / normalizers[0], 32 / 8
        for image in range(4):
            memory[image] = unit(0.5 * memory[image] + 0.5 * features[image].detach())
        of_data = torch.log(p[:, 0] / (p[:, 0] + noise + 1e-7))
        return -(of_data + torch.log(noise / (p[:, 1:] + noise + 1e-7)).sum(1)).mean()

    compare(method, loss_of, sgd(0.03, 1e-4), random_views(3, 16))
