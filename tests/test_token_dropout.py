"""Token dropout: which patches the student sees, by schedule, on any number of processes and after a resume."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from ssl_lightning import DINO, MAE, DINOv2, LastCheckpoint, MoCoV3, Optim, SimCLR, UserError
from ssl_lightning.commands import check
from tests.processes import run_processes
from tests.small import BACKBONE, DINOV3, VIT, data, small, trainer

SGD = Optim("sgd", base_lr=0.1, lr_scaling="none", warmup_epochs=0)


@pytest.mark.parametrize("net", [VIT, DINOV3], ids=["vit", "dinov3"])
def test_the_student_sees_patches_at_their_positions_and_all_other_tokens(net: dict[str, Any]) -> None:
    torch.manual_seed(0)
    method = small(MoCoV3, net, token_dropout=0.75)
    student, teacher = method.backbone, method.teacher_backbone
    plain = small(MoCoV3, net).state_dict()
    assert plain.keys() == method.state_dict().keys()
    assert teacher.patch_drop.drop_prob == 0
    student.patch_drop.drop_prob = 0.75
    images = torch.rand(6, 3, 64, 64)  # 64 patches
    drawn: list[Any] = []
    draw = student.patch_drop.drawn
    student.patch_drop.drawn = lambda tokens: drawn.append(draw(tokens)) or drawn[-1]
    tokens = student.forward_features(images)
    (kept,) = drawn
    assert kept.shape == (6, 16)
    assert tokens.shape[1] == student.num_prefix_tokens + 16
    assert all(len(set(row.tolist())) == 16 for row in kept)
    assert len({tuple(row.tolist()) for row in kept}) == 6  # each image and view has its own
    student.patch_drop.drop_prob = 0.0
    torch.testing.assert_close(tokens, student.encode(images, kept))
    student.patch_drop.drop_prob = 0.75
    assert teacher.forward_features(images).shape[1] == student.num_prefix_tokens + 64
    assert student.eval().forward_features(images).shape[1] == student.num_prefix_tokens + 64


class Tokens(L.Callback):
    """Number of tokens of the student in each step, and in validation."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop = stop
        self.trained: list[int] = []
        self.validated: set[int] = set()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        def count(block: Any, inputs: Any) -> None:
            if block.training:
                self.trained.append(inputs[0].shape[1])
            else:
                self.validated.add(inputs[0].shape[1])

        pl_module.backbone.blocks[0].register_forward_pre_hook(count)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.stop:
            raise KeyboardInterrupt


def test_patches_come_back_by_schedule_and_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    def run(stop: int | None, ckpt_path: str | None = None) -> tuple[dict[str, Any], Tokens]:
        L.seed_everything(1)
        tokens = Tokens(stop)
        last = LastCheckpoint(every_n_train_steps=3, dirpath=str(tmp_path / str(stop)))
        running = trainer(tmp_path, max_epochs=2, callbacks=[last, tokens], enable_checkpointing=True)
        module = small(SimCLR, VIT, token_dropout=0.75)
        with suppress(KeyboardInterrupt, SystemExit):
            running.fit(module, data(SimCLR, batch_size=16), ckpt_path=ckpt_path)
        return module.state_dict(), tokens

    whole, tokens = run(None)  # 8 steps on 16 patches, both views together
    assert tokens.trained == [1 + patches for patches in (4, 4, 4, 7, 10, 13, 16, 16)]
    assert tokens.validated == {17}
    run(4)
    resumed, again = run(None, str(tmp_path / "4" / "last.ckpt"))
    assert again.trained == tokens.trained[3:]
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def _recorded(rank: int, processes: int) -> check.Recorded:
    torch.manual_seed(0)
    module = small(DINO, VIT, token_dropout=0.5, drop_path=0.0, optim=SGD)
    return check.recorded(module, data(DINO, batch_size=16 // processes), processes, steps=3, sync_batchnorm=True)


@pytest.mark.slow
def test_two_processes_drop_the_patches_of_one() -> None:
    one, two = run_processes(_recorded, 1, 1)[0], run_processes(_recorded, 2, 2)
    differences = check.differences(two, one)
    assert all(difference < 1e-9 for difference in differences.values()), differences


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        (SimCLR, {**VIT, "token_dropout": 1.0}, "token_dropout 1.0 is a share of the patches"),
        (SimCLR, {**BACKBONE, "token_dropout": 0.5}, "which 'resnet10_cifar' is not; set it to 0"),
        (DINOv2, {"token_dropout": 0.5}, "DINOv2 needs all patches of its views; set --model.token_dropout to 0"),
        (MAE, {"token_dropout": 0.5}, "MAE needs all patches of its views"),
        (SimCLR, {**VIT, "token_dropout": 0.5, "chunk_size": 4}, "chunks are computed twice"),
    ],
)
def test_what_needs_all_patches_is_refused(
    method: Any, arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        trainer(tmp_path).fit(small(method, arguments), data(method))
