"""Which images to keep, by their features, as a CSV file that training reads and a page to look at."""

import csv
import io
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from PIL import Image
from torch import Tensor

from ssl_lightning.checkpoints import open_backbone
from ssl_lightning.checkpoints.files import replacing
from ssl_lightning.commands.curate.page import Group, page_of
from ssl_lightning.commands.evaluate.evaluator import quiet_trainer
from ssl_lightning.curation import balanced_choice, k_center, mean_similarity, near_duplicates, whitening
from ssl_lightning.data.base import SSLDataModule
from ssl_lightning.data.decoding import OpenedImage, opened_already
from ssl_lightning.data.images import Images
from ssl_lightning.data.sampler import spread
from ssl_lightning.errors import UserError, printable
from ssl_lightning.evaluation.features import extract_all

_ALTERED = 256
"""Number of images whose altered copies choose the threshold of near-duplicates."""
_SAMPLE = 2048
"""Number of images whose most similar image says what different images reach."""
_SHOWN = 24
"""Number of pairs, or images, in each part of the page."""


class Curation:
    """Which images to keep, by the features of a backbone: writes a CSV file with a row for each image.

    Its columns are ``path``, ``set`` (``train`` or ``val``), ``kept`` (1 or 0), and the numbers of the choice.
    ``--data.files CSV`` trains on the images that are kept. Validation images are always kept.

    Args:
        checkpoint: A checkpoint file, a folder of weights or ``hf-hub:NAME``; or the name of a timm or torchvision
            model, to use its pretrained weights; or ``pixels``.
        data: The images, with or without labels.
        backbone: Name of the timm or torchvision model; only for checkpoints that do not name it.
        backbone_kwargs: Arguments that build the backbone, e.g. ``{img_size: 96}``.
        branch: Which network of the checkpoint to read, by a part of its name, e.g. student; None follows the paper.
        output: CSV file to write.
        page: HTML file with pictures of what was decided, and what was nearly decided otherwise; None for no page.
        seed: Seed of random choices.
        trainer: Arguments of Lightning's Trainer, e.g. ``{devices: 2, precision: bf16-mixed}``; one device by default.
    """

    def __init__(
        self,
        checkpoint: str,
        data: SSLDataModule,
        backbone: str | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        branch: str | None = None,
        output: str = "curated.csv",
        page: str | None = None,
        seed: int = 0,
        trainer: dict[str, Any] | None = None,
    ) -> None:
        for option, path in (("--output", output), ("--page", page)):
            if path is not None and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
                raise UserError(f"{option} {path}: name a file in a folder that exists.")
        self.checkpoint, self.data, self.seed = checkpoint, data, seed
        self.output, self.page = Path(output), None if page is None else Path(page)
        self.trainer = trainer
        self.pretrained = open_backbone(checkpoint, backbone, backbone_kwargs, branch)

    def duplicates(self, threshold: float | None = None) -> str | None:
        """Keep one of each group of near-duplicates: images with a cosine similarity above a threshold.

        The similarity is that of whitened features, by which copies differ the most from images that are merely alike.
        Of two duplicates the validation image is kept, else the first in the data. A training image that repeats a
        validation image is removed, too.

        Args:
            threshold: Largest similarity of two kept images, up to 1. None takes the middle between what different
                images reach and what three quarters of altered copies reach (half the size, a JPEG of quality 50, the
                central 90 %, each of 256 images). Look at the pairs near it with ``--page``.
        """
        if (images := self._images()) is None:
            return None
        mean, matrix = whitening(images.features)
        if threshold is None:
            threshold = self._between_copies_and_others(images, mean, matrix)
        nearest, similarity = near_duplicates((images.features - mean) @ matrix, threshold)
        removed = similarity > threshold
        kept = ~removed | images.validation
        columns = {
            "duplicate_of": [
                images.path(int(other)) if gone else "" for other, gone in zip(nearest, removed, strict=True)
            ],
            "similarity": [f"{value:.4f}" if value > -2 else "" for value in similarity.tolist()],
        }
        across = int((removed & ~images.validation & images.validation[nearest.clamp(min=0)]).sum())
        self._write(images, kept, columns)
        order = similarity.argsort(descending=True)
        above, below = order[: int(removed.sum())], order[int(removed.sum()) :]
        self._write_page(
            f"Near-duplicates above a similarity of {threshold:.4f}",
            images,
            [
                Group("Removed, just above the threshold", _pairs(above.flip(0)[:_SHOWN], nearest, similarity)),
                Group("Kept, just below the threshold", _pairs(below[:_SHOWN], nearest, similarity)),
                Group("Removed, the most similar", _pairs(above[:_SHOWN], nearest, similarity)),
            ],
        )
        return self._summary(kept, f"near-duplicates above {threshold:.4f}; {across:,} repeat a validation image")

    def outliers(self, share: float = 0.01, k: int = 10) -> str | None:
        """Leave out the training images that are the least similar to any others.

        Args:
            share: Share of the training images to leave out, from 0 to 1.
            k: Number of most similar images whose mean similarity counts.
        """
        if not 0 <= share < 1:
            raise UserError(f"--share {share} must be at least 0, and below 1.")
        if (images := self._images()) is None:
            return None
        similarity = mean_similarity(images.features, k).cpu()
        ranked = torch.where(images.validation, torch.inf, similarity).argsort(stable=True)
        kept = torch.ones(len(similarity), dtype=torch.bool)
        kept[ranked[: round(share * int((~images.validation).sum()))]] = False
        self._write(images, kept, {"similarity": [f"{value:.4f}" for value in similarity.tolist()]})
        shown = [Group("The least similar to others, first", _single(ranked[: 4 * _SHOWN], similarity))]
        self._write_page(f"Outliers by the mean similarity to {k} images", images, shown)
        return self._summary(kept, f"outliers by the mean similarity to {k} images")

    def select(self, count: int, method: Literal["balanced", "k_center"] = "balanced") -> str | None:
        """Keep a diverse subset of the training images.

        Args:
            count: Number of images to keep.
            method: ``balanced``: as many of each cluster as the sizes allow, by hierarchical k-means; ``k_center``:
                each the farthest from all chosen before, which takes outliers first, so remove them before.
        """
        if (images := self._images()) is None:
            return None
        train = (~images.validation).nonzero().flatten()
        if not 0 < count <= len(train):
            raise UserError(f"--count {count} must lie between 1 and {len(train):,}, the number of training images.")
        kept, columns = images.validation.clone(), {}
        if method == "balanced":
            chosen, clusters = balanced_choice(images.features[train], count, self.seed)
            numbers = torch.full((len(kept),), -1)
            numbers[train] = clusters
            columns["cluster"] = [str(number) if number >= 0 else "" for number in numbers.tolist()]
        else:
            chosen = k_center(F.normalize(images.features[train], dim=1), count)
        kept[train[chosen]] = True
        self._write(images, kept, columns)
        sample = train[chosen][torch.linspace(0, len(chosen) - 1, min(len(chosen), 4 * _SHOWN)).long()]
        self._write_page("A diverse subset", images, [Group("Some of the images that are kept", _single(sample))])
        return self._summary(kept, f"images that {method} did not choose")

    def _images(self) -> "_AllImages | None":
        sets = extract_all(self.pretrained, self.data, quiet_trainer(self.trainer))
        return None if sets is None else _AllImages(sets)

    def _between_copies_and_others(self, images: "_AllImages", mean: Tensor, matrix: Tensor) -> float:
        """A similarity that few pairs of different images reach, and most altered copies."""
        whitened = F.normalize((images.features - mean) @ matrix, dim=1)
        some = spread(np.arange(len(whitened)), min(_SAMPLE, len(whitened)))
        nearest = (whitened[some] @ whitened.T).topk(2, dim=1).values[:, 1]  # the first is the image itself
        quarter, median = nearest.quantile(torch.tensor([0.25, 0.5])).tolist()
        others = median + 4 * (median - quarter)  # 2.7 deviations above, where similarities are normal
        places = spread(np.arange(len(whitened)), min(_ALTERED, len(whitened)))
        altered = [_Altered(images, places, alteration) for alteration in (_half, _recompressed, _cropped)]
        encoded = [(self._encoded(copies) - mean) @ matrix for copies in altered]
        copies = float(torch.cat([F.cosine_similarity(whitened[places], part) for part in encoded]).quantile(0.25))
        if copies <= others:
            rank_zero_warn(
                f"this backbone hardly distinguishes copies of an image ({copies:.2f}) from other images "
                f"({others:.2f}); look at --page, or set --threshold."
            )
        return (others + copies) / 2

    @torch.no_grad()
    def _encoded(self, images: Images) -> Tensor:
        backbone = self.pretrained.backbone.cpu().eval()
        batches = self.data.plain_loader(images)
        return torch.cat([backbone(self.data.on_after_batch_transfer(batch, 0).images).float() for batch in batches])

    def _write(self, images: "_AllImages", kept: Tensor, columns: dict[str, list[str]]) -> None:
        names = [images.path(place) for place in range(len(kept))]
        sets = ["val" if held_out else "train" for held_out in images.validation.tolist()]
        text = io.StringIO(newline="")
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["path", "set", "kept", *columns])
        table.writerows(zip(names, sets, kept.int().tolist(), *columns.values(), strict=True))
        self._save(self.output, text.getvalue(), "--output")

    def _write_page(self, title: str, images: "_AllImages", groups: list[Group]) -> None:
        if self.page is not None:
            self._save(self.page, page_of(title, groups, images.thumbnail, images.path), "--page")

    def _save(self, path: Path, text: str, option: str) -> None:
        try:
            with replacing(path) as file:
                file.write(text.encode(errors="surrogateescape"))
        except OSError as error:
            raise UserError(f"cannot write {option} {path}: {error}.") from error

    def _summary(self, kept: Tensor, what: str) -> str:
        lines = [f"{int(kept.sum()):,} of {len(kept):,} images kept; {int((~kept).sum()):,} {what}", str(self.output)]
        return "\n".join([*lines, str(self.page)] if self.page is not None else lines)


class _AllImages:
    """Validation images, then training images, with their features.

    Args:
        sets: What ``extract_all`` returns: training images, then any validation images.
    """

    def __init__(self, sets: list[Any]) -> None:
        ordered = sets[::-1]
        self.features = torch.cat([part.features for part in ordered])
        """``(N, D)``."""
        counts = [len(part.features) for part in ordered]
        self.validation = torch.arange(sum(counts)) < (counts[0] if len(ordered) > 1 else 0)
        """``(N,)`` bool."""
        self._places = [(part.images, index) for part in ordered for index in part.indices.tolist()]

    def path(self, place: int) -> str:
        """Path of an image below the root of the data, or its name."""
        images, index = self._places[place]
        return images.path(index) or images.name(index)

    def read(self, place: int) -> Tensor:
        """Pixels ``(C, H, W)`` of an image."""
        images, index = self._places[place]
        return images.read(index)

    def thumbnail(self, place: int, size: int = 112) -> Image.Image:
        """A small picture of an image."""
        pixels = _as_bytes(self.read(place))
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy() if len(pixels) == 3 else pixels[0].numpy())
        picture.thumbnail((size, size))
        return picture if min(picture.size) >= 64 else picture.resize((size, size * picture.height // picture.width), 0)


class _Altered(Images):
    """Altered copies of some images, in memory one at a time."""

    def __init__(self, images: _AllImages, places: Any, alteration: Any) -> None:
        self.images, self.places, self.alteration = images, places, alteration
        first = images.read(int(places[0]))
        self.channels, self.dtype = first.shape[0], first.dtype

    def __len__(self) -> int:
        return len(self.places)

    def name(self, index: int) -> str:
        return printable(self.images.path(int(self.places[index])))

    def open(self, index: int) -> OpenedImage:
        return opened_already(self.alteration(self.images.read(int(self.places[index]))))


def _half(image: Tensor) -> Tensor:
    """Half the size."""
    smaller = [max(1, side // 2) for side in image.shape[1:]]
    resized = F.interpolate(image[None].float(), smaller, mode="bilinear", antialias=True)[0]
    return resized.round().to(image.dtype)


def _recompressed(image: Tensor) -> Tensor:
    """A JPEG of quality 50."""
    if image.dtype != torch.uint8 or len(image) not in (1, 3):
        return _half(image)
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).save(file, "JPEG", quality=50)
    pixels = np.array(Image.open(file))
    return torch.from_numpy(pixels.reshape(*image.shape[1:], len(image))).permute(2, 0, 1)


def _cropped(image: Tensor) -> Tensor:
    """The central 90 % of each side."""
    top, left = (round(0.05 * side) for side in image.shape[1:])
    return image[:, top : image.shape[1] - top, left : image.shape[2] - left]


def _as_bytes(pixels: Tensor) -> Tensor:
    pixels = pixels[:3] if len(pixels) >= 3 else pixels[:1]
    return pixels if pixels.dtype == torch.uint8 else pixels.clamp(0, 255).to(torch.uint8)


def _pairs(places: Tensor, nearest: Tensor, similarity: Tensor) -> list[tuple[list[int], str]]:
    pairs = [(place, int(nearest[place])) for place in places.tolist()]
    return [([place, other], f"{similarity[place]:.4f}") for place, other in pairs if other >= 0]


def _single(places: Tensor, numbers: Tensor | None = None) -> list[tuple[list[int], str]]:
    return [([place], "" if numbers is None else f"{numbers[place]:.4f}") for place in places.tolist()]
