"""What follows the weights: moving averages and the queue."""

import pytest
import torch
from torch import nn

from ssl_lightning import UserError, ema
from ssl_lightning.queue import Queue


def test_a_teacher_moves_by_its_momentum_and_keeps_its_buffers() -> None:
    student = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    teacher = ema.teacher_of(student)
    with torch.no_grad():
        student[0].weight += 1.0
    student[1].running_mean += 5.0  # type: ignore[operator]
    before = teacher[0].weight.clone()  # type: ignore[index]
    ema.follow(teacher, student, 0.9)
    torch.testing.assert_close(teacher[0].weight, before + 0.1)  # type: ignore[index]
    assert not teacher[1].running_mean.any()  # type: ignore[index,union-attr]
    assert not any(p.requires_grad for p in teacher.parameters())


def test_small_moves_are_not_lost() -> None:
    teacher, student = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.constant_(teacher.weight, 1.0), nn.init.constant_(student.weight, 1.5)
    for _ in range(1000):
        ema.follow(teacher, student, 0.999)
    assert teacher.weight.item() == pytest.approx(1.31615, abs=1e-4)


def test_a_teacher_drops_nothing() -> None:
    import torchvision

    student = nn.Sequential(nn.Dropout(0.5), torchvision.ops.StochasticDepth(0.5, "row"))
    assert torch.equal(ema.teacher_of(student).train()(torch.ones(8, 4)), torch.ones(8, 4))
    assert student[0].p == 0.5


def test_a_queue_that_does_not_fit_the_batch_is_refused() -> None:
    for length in (0, 4, 20):
        with pytest.raises(UserError, match=f"queue_length={length}"):
            Queue(torch.zeros(length, 2)).check(8)
    Queue(torch.zeros(16, 2)).check(8)


def test_the_queue_is_a_ring_that_splits_writes_at_its_end() -> None:
    queue = Queue(torch.zeros(5, 1))
    for value in (1.0, 2.0, 3.0):
        queue.push(torch.full((2, 1), value))
    assert queue.rows[:, 0].tolist() == [3, 1, 2, 2, 3]
    queue.push(torch.full((5, 1), 4.0))
    assert queue.rows[:, 0].tolist() == [4] * 5


def test_the_queue_goes_on_where_it_was_after_a_checkpoint() -> None:
    queue, again = Queue(torch.zeros(8, 1)), Queue(torch.zeros(8, 1))
    for value in (1.0, 2.0, 3.0):
        queue.push(torch.full((4, 1), value))
    again.load_state_dict(queue.state_dict())
    assert again.written == 12
    queue.push(torch.full((4, 1), 4.0)), again.push(torch.full((4, 1), 4.0))
    assert torch.equal(queue.rows, again.rows)
    assert queue.rows[:, 0].tolist() == [3] * 4 + [4] * 4
    assert not queue.rows.requires_grad
