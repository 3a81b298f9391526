"""Smaller views in the first epochs: the same crops, exact after a resume, and full size in evaluation."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from ssl_lightning import DINO, BEiT, DINOv2, FakeData, ImageFolderData, LastCheckpoint, SimCLR, UserError, ViewSpec
from ssl_lightning.data.crops import ViewMaker
from ssl_lightning.data.noise import noisy_square
from ssl_lightning.data.resolution import Resolution, Stages, length_in_epochs
from tests.small import BACKBONE, METHODS, VIT, VIT_ONLY, data, slow_unless, small, trainer

HALF = Resolution(scale=0.5, until=0.5)


class Sizes(L.Callback):
    """Sides of the views and of the images of validation, by epoch; stops after some steps."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop = stop
        self.seen: dict[int, set[int]] = {}
        self.validated: set[int] = set()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.setdefault(trainer.current_epoch, set()).update(view.shape[-1] for view in batch[0])
        if trainer.global_step == self.stop:
            raise KeyboardInterrupt

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.validated.add(batch[0].shape[-1])


def test_smaller_views_have_the_same_crops_and_random_numbers() -> None:
    specs = (ViewSpec(size=28, jitter=0.8, brightness=0.4, blur=0.5, blur_kernel=9), ViewSpec(size=14, count=2))
    small_specs = HALF.small(specs, patch=7)
    assert [spec.size for spec in small_specs] == [14, 7]
    assert HALF.small(specs, patch=14)[1].size == 14  # never below a patch
    stages = Stages(specs, small_specs, 1.5)
    indices, heights, widths = np.arange(6), np.full(6, 40), np.full(6, 50)
    plain = ViewMaker(specs, seed=3).draw(1, indices, heights, widths)
    changed = ViewMaker(specs, 3, stages=stages).draw(1, indices, heights, widths)
    for ours, theirs in zip(changed[0], plain[0], strict=True):
        assert (ours == theirs).all()
    assert [ViewMaker(specs, 3, stages=stages).sizes(epoch) for epoch in (0, 1, 2)] == [[14, 7], [14, 7], [28, 14]]


@pytest.mark.parametrize("in_memory", [False, True], ids=["cropped by workers", "cropped in the batch"])
def test_views_are_those_of_a_run_at_the_smaller_size(photos: Path, in_memory: bool) -> None:
    kwargs: dict[str, Any] = {"batch_size": 8, "seed": 0, "num_workers": 0}
    view = {"jitter": 0.8, "brightness": 0.4}
    made = []
    for size, resolution in ((32, HALF), (16, None)):
        views = [ViewSpec(size=size, **view)]  # type: ignore[arg-type]
        source: Any = FakeData(views=views, resolution=resolution, image_size=32, **kwargs)
        if not in_memory:
            source = ImageFolderData(str(photos), views=views, resolution=resolution, in_memory=False, **kwargs)
        batch = next(iter(source.train_dataloader()))
        assert (batch.images is None) != in_memory
        made.append(source.on_after_batch_transfer(batch, 0).views[0])
    assert made[0].shape[-1] == 16
    assert torch.equal(*made)


@pytest.mark.parametrize("in_memory", [False, True], ids=["cropped by workers", "cropped in the batch"])
def test_a_square_of_each_image_is_noisy_once_views_have_their_full_size(photos: Path, in_memory: bool) -> None:
    whole = [ViewSpec(size=32, count=2, scale=(1, 1), ratio=(1, 1), flip=0, mean=(0,), std=(1,))]

    def views(noise: float, epoch: int) -> torch.Tensor:
        resolution = Resolution(scale=0.5, until=0.5, noise=noise)
        kwargs: dict[str, Any] = {"batch_size": 8, "seed": 0, "num_workers": 0, "views": whole}
        source: Any = FakeData(image_size=32, resolution=resolution, **kwargs)
        if not in_memory:
            source = ImageFolderData(str(photos), resolution=resolution, in_memory=False, **kwargs)
        dataset = source.train_dataloader().dataset
        dataset.maker.stages = replace(dataset.maker.stages, epochs=1.0)
        batch = dataset[epoch, np.arange(8)]
        return torch.stack(source.on_after_batch_transfer(batch, 0).views)

    assert torch.equal(views(0.5, 0), views(0, 0))
    plain, noisy = views(0, 1), views(0.5, 1)
    assert torch.equal(noisy, views(0.5, 1))
    changed = noisy != plain  # (2, 8, 3, S, S)
    assert changed.flatten(2).any(2).all()
    assert not changed.all()
    assert not torch.equal(noisy - plain, views(0.5, 2) - views(0, 2))
    assert noisy.min() >= 0
    assert noisy.max() <= 1
    if in_memory:
        assert torch.equal(noisy[0], noisy[1])


def test_noise_is_the_same_for_the_upper_rows_and_leaves_the_image_as_it_is() -> None:
    image = np.full((40, 60, 3), 128, np.uint8)
    whole = [noisy_square(image, 40, 0.2, 0, 0, index, 0) for index in range(200)]
    assert (image == 128).all()
    for index in range(20):
        assert (noisy_square(image[:25], 40, 0.2, 0, 0, index, 0) == whole[index][:25]).all()
    sides = [int((noisy != 128).any(2).any(1).sum()) for noisy in whole]
    assert 15 < np.mean(sides) < 25
    assert max(sides) == 40
    stds = [np.std(noisy[noisy != 128] / 255) for noisy, side in zip(whole, sides, strict=True) if side > 10]
    assert 0.08 < np.mean(stds) < 0.12
    assert not (whole[0] == noisy_square(image, 40, 0.2, 0, 0, 0, 1)).all()


def test_a_run_that_is_resumed_in_a_stage_ends_bit_for_bit_the_same(tmp_path: Path) -> None:
    def run(stop: int | None, ckpt_path: str | None = None) -> tuple[dict[str, Any], Sizes]:
        L.seed_everything(1)
        sizes = Sizes(stop)
        last = LastCheckpoint(every_n_train_steps=3, dirpath=str(tmp_path / str(stop)))
        running = trainer(tmp_path, max_epochs=4, callbacks=[last, sizes], enable_checkpointing=True)
        module, source = small(DINO), data(DINO, batch_size=16, resolution=HALF, num_workers=0)
        with suppress(KeyboardInterrupt, SystemExit):
            running.fit(module, source, ckpt_path=ckpt_path)
        return module.state_dict(), sizes

    whole, sizes = run(None)
    assert sizes.seen == {0: {16, 8}, 1: {16, 8}, 2: {32, 16}, 3: {32, 16}}
    assert sizes.validated == {32}
    run(7)  # within the last epoch of the first stage
    resumed, sizes = run(None, str(tmp_path / "7" / "last.ckpt"))
    assert sizes.seen == {1: {16, 8}, 2: {32, 16}, 3: {32, 16}}
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.parametrize("method", slow_unless(lambda method: method in (SimCLR, DINOv2), METHODS))
def test_every_method_trains_on_both_sizes(method: Any, tmp_path: Path) -> None:
    sizes = Sizes()
    views = [ViewSpec(size=64, count=method.global_views or 1), *([ViewSpec(size=32)] if method.local_views else [])]
    source = FakeData(batch_size=8, num_images=32, seed=0, image_size=64, views=views, resolution=HALF)
    running = trainer(tmp_path, max_epochs=2, limit_train_batches=2, callbacks=[sizes])
    running.fit(small(method, VIT if method in VIT_ONLY else BACKBONE), source)
    assert [max(sizes.seen[epoch]) for epoch in (0, 1)] == [32, 64]


def test_all_epochs_may_have_the_smaller_views(tmp_path: Path) -> None:
    sizes = Sizes()
    source = data(SimCLR, batch_size=16, resolution=Resolution(scale=0.5, until=1))
    trainer(tmp_path, max_epochs=2, limit_train_batches=1, callbacks=[sizes]).fit(small(SimCLR), source)
    assert sizes.seen == {0: {16}, 1: {16}}
    assert sizes.validated == {32}


def test_the_end_of_a_training_may_be_given_in_steps(tmp_path: Path) -> None:
    steps = trainer(tmp_path, max_epochs=-1, max_steps=30, accumulate_grad_batches=2)
    assert length_in_epochs(steps, batches=20) == 3
    assert length_in_epochs(steps, batches=19) == 3  # the last step is of a single batch
    steps = trainer(tmp_path, max_epochs=2, max_steps=30, limit_train_batches=0.5)
    assert length_in_epochs(steps, batches=20) == 2
    with pytest.raises(UserError, match=r"set --trainer.max_epochs"):
        length_in_epochs(trainer(tmp_path, max_epochs=-1), batches=20)


@pytest.mark.parametrize("wrong", [{"scale": 1.0}, {"until": 0.0}, {"until": 1.5}, {"scale": -1}, {"noise": 2.0}])
def test_fractions_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"--data.resolution.(scale|until|noise) .*(between|from) 0 (and|to) 1"):
        Resolution(**wrong)


def test_a_scale_that_changes_nothing_is_refused() -> None:
    views = [ViewSpec(size=32, count=2), ViewSpec(size=16)]
    assert [view.size for view in Resolution(0.9).small(views, 4)] == [28, 16]
    with pytest.raises(UserError, match=r"scale 0.9 makes no view smaller than 16, 32 px, in steps of 8 px"):
        Resolution(0.9).small(views, 8)


def test_what_cannot_change_its_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set --data.resolution to null"):
        FakeData(transform=nn.Identity(), resolution=HALF)
    fixed = small(BEiT, backbone="beit_base_patch16_224", backbone_kwargs=VIT["backbone_kwargs"])
    with pytest.raises(UserError, match=r"--data.resolution asks for smaller views.*takes images of 32 px only"):
        trainer(tmp_path).fit(fixed, FakeData(batch_size=8, resolution=HALF))
