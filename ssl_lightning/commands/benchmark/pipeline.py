"""The benchmark ``pipeline``: our input pipeline and lightly's."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from json import dumps
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from ssl_lightning.commands.benchmark.transformed_images import TransformedImages
from ssl_lightning.data.base import SSLDataModule
from ssl_lightning.data.datasets import ViewDataset
from ssl_lightning.data.folder import ImageFolderData
from ssl_lightning.data.images import ImageArray
from ssl_lightning.data.views import ViewSpec
from ssl_lightning.machine import single_thread


@dataclass(frozen=True)
class PipelineResult:
    """What ``pipeline`` measured: medians over the passes; rates by the clock, ``ms`` in processor time per image."""

    views: str
    image_size: int
    num_images: int
    in_memory: bool
    lightly_images_per_second: float
    lightly_ms: float
    lightly_bytes: int
    worker_images_per_second: float
    worker_ms: float
    augmentation_ms: float
    images_per_second: float
    bytes: int
    num_workers: int
    lightly_loader_images_per_second: float | None
    loader_images_per_second: float | None

    @property
    def ratios(self) -> dict[str, float]:
        """How many times as fast as lightly: only the worker, everything on the CPU, and whole loaders."""
        ratios = {
            "worker_ratio": self.worker_images_per_second / self.lightly_images_per_second,
            "ratio": self.images_per_second / self.lightly_images_per_second,
        }
        if self.loader_images_per_second and self.lightly_loader_images_per_second:
            ratios["loader_ratio"] = self.loader_images_per_second / self.lightly_loader_images_per_second
        return ratios

    @property
    def json(self) -> str:
        """All numbers and ratios as JSON."""
        return dumps({**asdict(self), **self.ratios})

    def __str__(self) -> str:
        ratios = self.ratios
        rows = [
            ["", "images/s", "x lightly", "CPU ms/image", "bytes/image"],
            _row("lightly", self.lightly_images_per_second, 1, self.lightly_ms, self.lightly_bytes),
            _row("worker", self.worker_images_per_second, ratios["worker_ratio"], self.worker_ms, self.bytes),
            ["augmentation", "", "", f"{self.augmentation_ms:.2f}", ""],
            _row("both", self.images_per_second, ratios["ratio"], self.worker_ms + self.augmentation_ms),
        ]
        if self.loader_images_per_second and self.lightly_loader_images_per_second:
            rows.append(_row("lightly's loader", self.lightly_loader_images_per_second, 1))
            rows.append(_row("loader", self.loader_images_per_second, ratios["loader_ratio"]))
        source = "images held in memory" if self.in_memory else "image files"
        lines = [
            f"{self.views} at {self.image_size} px from {self.num_images} {source}, one thread"
            + (f"; loaders with {self.num_workers} workers" if self.num_workers else "")
        ]
        lines += [f"{row[0]:18}" + "".join(f"{cell:>14}" for cell in row[1:]) for row in rows]
        return "\n".join(lines)


def _row(name: str, rate: float, ratio: float, ms: float | None = None, size: int | None = None) -> list[str]:
    return [
        name,
        f"{rate:,.1f}",
        f"{ratio:.2f}",
        "" if ms is None else f"{ms:.2f}",
        "" if size is None else f"{size:,}",
    ]


def pipeline(
    root: str,
    views: Literal["simclr", "moco_v2", "moco_v3", "byol", "swav", "dino", "mae"] = "simclr",
    image_size: int = 224,
    num_workers: int = 0,
    batch_size: int = 128,
    num_images: int = 240,
    passes: int = 5,
) -> PipelineResult:
    """Compare the input pipeline with lightly's transform for the same method, on the same files.

    The two take turns, batch by batch, one thread each. The worker decodes, crops and draws random numbers; the
    augmentation, which training leaves to the device, runs on the CPU here.

    Args:
        root: Folder of images.
        views: Method whose views are made.
        image_size: Side of the full-size views in pixels.
        num_workers: Worker processes of the loaders to compare as well; 0 skips that comparison.
        batch_size: Images per batch.
        num_images: Images per pass.
        passes: Number of passes; the median is reported.
    """
    data = ImageFolderData(
        root,
        labels="none",
        views=views,
        image_size=image_size,
        batch_size=min(batch_size, num_images),
        train_samples=num_images,
        num_workers=num_workers,
    )
    with single_thread():
        return _measured(data, views, passes)


def _measured(data: SSLDataModule, views: str, passes: int) -> PipelineResult:
    data.setup()
    images, specs = data.train_images, data.view_specs
    assert images is not None
    lightly = TransformedImages(images, _lightly_transform(views, specs))
    own = ViewDataset(images, specs, seed=0)
    batches = torch.arange(len(images)).split(data.batch_size)
    lightly_clock, worker_clock, augmentation_clock = _Clock(len(images)), _Clock(len(images)), _Clock(len(images))
    for epoch in range(passes):
        for batch in batches:
            with lightly_clock:
                for index in batch.tolist():
                    transformed = lightly[index]
            with worker_clock:
                raw = own[epoch, batch.numpy()]
            with augmentation_clock:
                raw.augmented(specs)
        for clock in (lightly_clock, worker_clock, augmentation_clock):
            clock.end_pass()
    both = [sum(seconds) for seconds in zip(worker_clock.seconds, augmentation_clock.seconds, strict=True)]
    loaders = _loader_rates(data, lightly, passes) if data.num_workers else (None, None)
    return PipelineResult(
        views=views,
        image_size=data.image_size,
        num_images=len(images),
        in_memory=isinstance(images, ImageArray),
        lightly_images_per_second=lightly_clock.rate,
        lightly_ms=lightly_clock.cpu_ms,
        lightly_bytes=_size(transformed),
        worker_images_per_second=worker_clock.rate,
        worker_ms=worker_clock.cpu_ms,
        augmentation_ms=augmentation_clock.cpu_ms,
        images_per_second=len(images) / statistics.median(both),
        bytes=_size(raw) // len(raw.labels),
        num_workers=data.num_workers or 0,
        lightly_loader_images_per_second=loaders[0],
        loader_images_per_second=loaders[1],
    )


class _Clock:
    """Adds up the time inside ``with``, pass by pass."""

    def __init__(self, images: int) -> None:
        self.images = images
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self._seconds = self._cpu_seconds = 0.0

    def __enter__(self) -> None:
        self._seconds -= time.perf_counter()
        self._cpu_seconds -= time.process_time()

    def __exit__(self, *error: object) -> None:
        self._seconds += time.perf_counter()
        self._cpu_seconds += time.process_time()

    def end_pass(self) -> None:
        self.seconds.append(self._seconds)
        self.cpu_seconds.append(self._cpu_seconds)
        self._seconds = self._cpu_seconds = 0.0

    @property
    def rate(self) -> float:
        """Images per second, median of the passes."""
        return self.images / statistics.median(self.seconds)

    @property
    def cpu_ms(self) -> float:
        """Milliseconds of processor time per image, median of the passes."""
        return 1000 * statistics.median(self.cpu_seconds) / self.images


def _loader_rates(data: SSLDataModule, lightly: "TransformedImages", passes: int) -> tuple[float, float]:
    """Images per second of whole loaders: lightly's and ours."""
    options: dict[str, Any] = {"num_workers": data.num_workers, "persistent_workers": True, "drop_last": True}
    loaders: list[Iterable[Any]] = [
        DataLoader(lightly, data.batch_size, shuffle=True, **options),
        data.train_dataloader(),
    ]
    images = len(lightly) // data.batch_size * data.batch_size
    seconds: list[list[float]] = [[], []]
    for _ in range(passes + 1):
        for loader, times in zip(loaders, seconds, strict=True):
            start = time.perf_counter()
            for _ in loader:
                pass
            times.append(time.perf_counter() - start)
    slow, fast = (images / statistics.median(times[1:]) for times in seconds)  # workers start in the first pass
    return slow, fast


def _size(batch: Any) -> int:
    """Bytes of all tensors in nested sequences."""
    if isinstance(batch, Tensor):
        return batch.nbytes
    return sum(map(_size, batch)) if isinstance(batch, list | tuple) else 0


def _lightly_transform(views: str, specs: Sequence[ViewSpec]) -> Callable[[Image.Image], Any]:
    """The transform of lightly for a method: as many views of the same sizes, and no blur where we have none."""
    from lightly import transforms
    from lightly.transforms.byol_transform import BYOLView1Transform, BYOLView2Transform

    size, last = specs[0].size, specs[-1]
    local_size, local_count = (last.size, last.count) if last.size < size else (size, 0)
    blurred = any(spec.blur for spec in specs)
    blur: dict[str, Any] = {} if blurred else {"gaussian_blur": 0.0}
    if views == "simclr":
        return transforms.SimCLRTransform(size, **blur)
    if views == "moco_v2":
        return transforms.MoCoV2Transform(size, **blur)
    if views == "swav":
        return transforms.SwaVTransform(crop_sizes=(size, local_size), crop_counts=(2, local_count), **blur)
    if views == "dino":
        blurs = (1.0, 0.1, 0.5) if blurred else (0.0, 0.0, 0.0)
        return transforms.DINOTransform(
            global_crop_size=size, local_crop_size=local_size, n_local_views=local_count, gaussian_blur=blurs
        )
    if views == "mae":
        return transforms.MAETransform(size)
    # lightly has none for MoCo v3, which took its augmentation from BYOL
    return transforms.BYOLTransform(BYOLView1Transform(size, **blur), BYOLView2Transform(size, **blur))
