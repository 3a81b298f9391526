"""Augmentation of one's own in place of views: what may be given, and that any loader makes the same views."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightly import transforms as lightly
from torch import Tensor
from torchvision.transforms import v2

from ssl_lightning import BYOL, DINO, MAE, ArrayData, ImageFolderData, SimCLR, UserError
from ssl_lightning.data.transforms import OwnViews
from tests.small import VIT, slow_unless, small, trainer
from tests.test_sources import batches_of, equal

NORMALIZE = v2.Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


class Everywhere:
    """Draws from each place that random numbers come from."""

    def __init__(self, size: int = 16, count: int = 2) -> None:
        self.size, self.count, self.random = size, count, np.random.default_rng()

    def __call__(self, image: Any) -> list[Tensor]:
        numbers = [random.random(), np.random.rand(), torch.rand(()).item(), self.random.random()]  # noqa: NPY002
        pixels = torch.from_numpy(np.array(image.resize((self.size, self.size)))).permute(2, 0, 1) / 255
        return [pixels * 0.5 + number / 10 for number in [sum(numbers), *numbers][: self.count]]


def albumentations() -> Any:
    module = pytest.importorskip("albumentations")
    return module.Compose([module.RandomResizedCrop((16, 16)), module.HorizontalFlip(), module.GaussNoise(p=1)])


def in_a_function() -> Callable[..., Any]:
    module = pytest.importorskip("albumentations")
    first, second = (module.Compose([module.RandomCrop(16, 16), module.ToTensorV2()]) for _ in range(2))

    def views(image: Any) -> list[Any]:
        return [transform(image=np.array(image))["image"] for transform in (first, second)]

    return views


def torchvision() -> Any:
    return v2.Compose([v2.RandomResizedCrop(16), v2.ColorJitter(0.4), v2.ToImage()])


MADE: dict[str, Callable[[], Any]] = {
    "every generator": Everywhere,
    "albumentations": albumentations,
    "albumentations in a function": in_a_function,
    "torchvision": torchvision,
    "lightly": lambda: lightly.DINOTransform(16, local_crop_size=8, n_local_views=2),
}


@pytest.mark.parametrize("name", slow_unless(lambda name: name != "lightly", MADE))
def test_the_same_views_for_any_loader(photos: Path, name: str) -> None:
    transform = MADE[name]()

    def batches(batch_size: int = 10, workers: int = 0, rank: int = 0, world_size: int = 1, **place: int) -> Any:
        data = ImageFolderData(
            str(photos), transform=transform, batch_size=batch_size, num_workers=workers, val_fraction=0.0
        )
        return batches_of(data, rank=rank, world_size=world_size, **place)

    state = random.getstate(), torch.get_rng_state()
    whole = batches()
    assert random.getstate() == state[0]  # the program's own random numbers stay as they are
    assert torch.equal(torch.get_rng_state(), state[1])
    for same in (batches(workers=2), [*whole[:2], *batches(start=2)]):
        assert all(equal(first, second) for first, second in zip(whole, same, strict=True))
    assert not any(equal(first, second) for first, second in zip(whole, batches(epoch=1), strict=True))
    parts = [batches(batch_size=5, rank=rank, world_size=2)[1].crops for rank in (0, 1)]
    count = len(whole[1].crops[0]) // 10
    joined = [torch.cat(halves) for halves in zip(*(part[0].chunk(count) for part in parts), strict=True)]
    assert torch.equal(torch.cat(joined), whole[1].crops[0])
    assert not torch.equal(joined[0][0], joined[0][1])
    assert count == 1 or not torch.equal(joined[0], joined[1])


LIGHTLY = [name for name in dir(lightly) if name.endswith("Transform")]
PARTS = ("AddGrid", "AmplitudeRescale", "IRFFT2D", "PhaseShift", "RFFT2D", "RandomFrequencyMask")
"""Steps between tensors, which make no view of an image."""


@pytest.mark.parametrize("name", [name for name in LIGHTLY if not name.startswith(PARTS)])
def test_every_transform_of_lightly_makes_views(name: str) -> None:
    image = torch.randint(256, (3, 70, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    transform = getattr(lightly, name)()
    if name in ("SwaVViewTransform", "VICRegLViewTransform"):  # without a crop
        transform = v2.Compose([v2.Resize((64, 64)), transform])
    own = OwnViews(transform, image)
    sources = np.zeros(sum(spec.count for spec in own.specs), np.int64)
    first, second = own.views([image], sources, 1, 2, 3), own.views([image], sources, 1, 2, 3)
    assert all(map(torch.equal, first, second))
    assert [view.shape[1] for view in first] == [spec.size for spec in own.specs for _ in range(spec.count)]
    assert ("float32 (7, 7, 2)" in own.left_out) == (name == "VICRegLTransform")


def test_views_are_normalized_once(photos: Path) -> None:
    steps = [v2.Resize((16, 16)), v2.ToImage()]
    as_floats = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), NORMALIZE])
    image = torch.full((3, 20, 20), 51, dtype=torch.uint8)
    for transform, mean, value in (
        (as_floats, NORMALIZE.mean, (0.2 - 0.4) / 0.2),
        (lambda picture: [as_floats(picture)] * 2, NORMALIZE.mean, (0.2 - 0.4) / 0.2),
        (v2.Compose(steps), (0.485, 0.456, 0.406), (0.2 - 0.485) / 0.229),
        (v2.Resize((16, 16)), (0.485, 0.456, 0.406), (0.2 - 0.485) / 0.229),
        (v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True)]), (0.0,), 0.2),
    ):
        data = ArrayData(image[None].repeat(4, 1, 1, 1), transform=transform, batch_size=2, num_workers=0)
        views = batches_of(data)[0].augmented(data.view_specs).views
        assert len(views) == 2
        assert data.image_transform["mean"] == tuple(mean)  # evaluation prepares its images alike
        assert float(views[1][0, 0, 0, 0]) == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize(
    ("method", "transform", "sizes"),
    [
        (SimCLR, Everywhere(32), [32, 32]),
        (BYOL, v2.Compose([v2.RandomResizedCrop(32), v2.ToImage()]), [32, 32]),
        (MAE, v2.Compose([v2.RandomResizedCrop(32), v2.ToImage()]), [32]),
        (DINO, lightly.DINOTransform(32, local_crop_size=16, n_local_views=3), [32, 32, 16, 16, 16]),
    ],
)
def test_methods_train_on_them(photos: Path, tmp_path: Path, method: Any, transform: Any, sizes: list[int]) -> None:
    data = ImageFolderData(str(photos), transform=transform, batch_size=8, num_workers=0)
    fitting = trainer(tmp_path, max_steps=1, limit_val_batches=1)
    fitting.fit(small(method, VIT) if method is MAE else small(method), data)
    assert fitting.global_step == 1
    assert [spec.size for spec in data.view_specs for _ in range(spec.count)] == sizes
    assert data.facts["transform"] == type(transform).__name__
    preview = data.preview(num_rows=2, num_images=4)
    assert preview.overlap is None
    assert preview.sheet.height == 14 + 2 * 152


def test_pairs_go_through_it(photos: Path) -> None:
    def first_pixel(image: Any) -> list[Tensor]:
        value = float(np.array(image)[0, 0, 0]) / 255
        return [torch.full((3, 8, 8), value) for _ in range(4)]

    data = ImageFolderData(str(photos), transform=first_pixel, positives="next", batch_size=40, num_workers=0)
    data.val_fraction = 0.0
    (batch,) = batches_of(data)
    views = batch.augmented(data.view_specs).views
    values = {int(index): float(view[0, 0, 0]) for index, view in zip(batch.indices, views[0], strict=True)}
    for number, index in enumerate(batch.indices.tolist()):
        partner = index if index in (19, 39) else index + 1
        assert [float(view[number, 0, 0, 0]) for view in views] == [values[index], values[partner]] * 2


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (
            lambda image: image.nothing,
            r"--data.transform <lambda> failed: AttributeError.*test_transforms.py, line",
        ),
        (lambda _: [3, "a"], "--data.transform <lambda> returned no view but int, str"),
        (lambda image: [image.resize((8, 9))] * 2, "a view of 8x9 px; views must be square"),
        (lambda image: [image.resize((min(image.size),) * 2)] * 2, "the views of all images must have the same sizes"),
    ],
)
def test_what_makes_no_views_is_refused(photos: Path, transform: Any, message: str) -> None:
    data = ImageFolderData(str(photos), transform=transform, batch_size=8, num_workers=0)
    with pytest.raises(UserError, match=message):
        batches_of(data)


def test_views_and_a_transform_are_one_too_many(photos: Path) -> None:
    with pytest.raises(UserError, match=r"leave out --data.views"):
        ImageFolderData(str(photos), views="byol", transform=Everywhere())
