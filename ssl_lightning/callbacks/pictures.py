"""Pictures of what a method has learned, while it trains."""

import io
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ssl_lightning.backbones.maps import map_and_attention
from ssl_lightning.callbacks.explored import bank_of, explored
from ssl_lightning.callbacks.features import PlainFeatures, in_eval_mode
from ssl_lightning.callbacks.knn_probe import KNNProbe
from ssl_lightning.callbacks.progress import planned_epochs
from ssl_lightning.callbacks.tiles import keep_for_page, tiles_of
from ssl_lightning.drawing import fitted, framed, heat, picture_of, pixels_of, sheet, show, squares
from ssl_lightning.errors import UserError
from ssl_lightning.evaluation.components import aligned, joint_components, patch_colors
from ssl_lightning.runs import ERRORS_FILE, MAP_FILE, picture_file

_NEIGHBORS = 7
_SAME_CLASS, _OTHER_CLASS = "#3cb44b", "#e6194b"


class Pictures(L.Callback):
    """Draws what the method has learned, for TensorBoard, Weights & Biases and ``pictures/<name>/<epoch>.png``.

    For the page of the run, the newest map is also kept as ``map.json``, where its points show their images, and what
    the kNN probe gets wrong as ``errors.json``.

    ``neighbours``: some training images with their nearest neighbors by cosine similarity, in a green frame if the
    class is the same, else in a red one. ``map``: features in two dimensions, colored by class. ``components``: the
    principal components of the features of patches, or of the places of a CNN's map, as colors. ``attention``: where
    each head of a ViT's class token looks in the last block. ``reconstructions``: the output of a method that predicts
    pixels. ``schedules``: learning rate, weight decay and teacher momentum over the whole run, with the current step.
    All pictures use the same images, prepared as for evaluation. A stream cannot return to its images, so it gets only
    the schedules.

    Args:
        every_n_epochs: Draw every this many epochs, and after the last one.
        num_images: Number of images in each picture.
        num_compared: Number of training images to search for neighbors and to show in the map, evenly spread. None
            means 2,048 of those that the kNN probe searches; without the probe 1/32 of all, at least 512 and at most
            2,048.
        projection: How the map projects features to two dimensions: ``pca``, ``tsne`` (scikit-learn's), or ``umap``
            (``pip install "ssl_lightning[umap]"``).
    """

    def __init__(
        self,
        every_n_epochs: int = 10,
        num_images: int = 8,
        num_compared: int | None = None,
        projection: Literal["pca", "tsne", "umap"] = "pca",
    ) -> None:
        if every_n_epochs < 1 or num_images < 1 or (num_compared is not None and num_compared < 3):
            raise UserError(
                f"--pictures.every_n_epochs={every_n_epochs} and --pictures.num_images={num_images} must be at least "
                f"1, and --pictures.num_compared={num_compared} at least 3."
            )
        self.every_n_epochs, self.num_images, self.num_compared = every_n_epochs, num_images, num_compared
        self.projection = projection
        if projection == "umap":
            _umap()  # raises now if the library is missing
        self._components: list[Tensor] = []
        self._tiles: tuple[Tensor, Tensor] | None = None  # indices of images, and their small pictures

    def state_dict(self) -> dict[str, Any]:
        """The components of the last picture, whose signs the next picture keeps."""
        return {"components": self._components}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        self._components = state_dict["components"]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw, if pictures are due. All processes compute features; the first process draws."""
        epoch = trainer.current_epoch + 1
        if not trainer.loggers or (epoch % self.every_n_epochs and epoch != planned_epochs(trainer)):
            return
        data: Any = getattr(trainer, "datamodule", None)
        devices = [pl_module.device] if pl_module.device.type == "cuda" else []
        with in_eval_mode(pl_module), torch.no_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(0)  # the same masks every time
            trainer.strategy.on_validation_start()  # which gathers what is sharded
            pictures = self._image_pictures(trainer, pl_module, data) if hasattr(data, "plain_dataloader") else {}
            pictures |= self._feature_pictures(trainer, pl_module, data) if hasattr(data, "plain_dataloader") else {}
            self._keep_errors(trainer, pl_module, data)
            trainer.strategy.on_validation_end()
        if trainer.is_global_zero:
            if (schedules := _schedules(trainer, pl_module)) is not None:
                pictures["schedules"] = schedules
            for name, picture in pictures.items():
                show(trainer, name, picture, picture_file(name, epoch))

    def _image_pictures(self, trainer: L.Trainer, pl_module: Any, data: Any) -> dict[str, Image.Image]:
        """Pictures that show each image separately."""
        batch = next(iter(data.plain_dataloader(self.num_images * trainer.world_size)), None)
        if batch is None:
            return {}
        images = trainer.strategy.batch_to_device(batch, dataloader_idx=0).images[: self.num_images]
        mean, std = data.image_transform["mean"], data.image_transform["std"]
        backbone = getattr(pl_module, "evaluated_backbone", None)
        grid = attention = None
        with trainer.precision_plugin.val_step_context():
            made = pl_module.pictures(images) if hasattr(pl_module, "pictures") else {}
            with suppress(UserError):  # of a network without a map
                grid, attention = (None, None) if backbone is None else map_and_attention(backbone, images)
        if not trainer.is_global_zero:
            return {}
        columns = {
            name: [_cell(image, mean, std) for image in column] for name, column in {"image": images, **made}.items()
        }
        pictures = {}
        if made:
            pictures["reconstructions"] = sheet(list(zip(*columns.values(), strict=True)), list(columns))
        if grid is not None:
            pictures["components"] = self._drawn_components([*grid.float().cpu()], columns["image"])
        if attention is not None:
            heads_of_images = attention.cpu().double().numpy()  # (B, heads, rows, columns)
            rows = [[image, *map(heat, heads)] for image, heads in zip(columns["image"], heads_of_images, strict=True)]
            pictures["attention"] = sheet(
                rows, ["image", *(f"head {number + 1}" for number in range(len(rows[0]) - 1))]
            )
        return pictures

    def _drawn_components(self, maps: list[Tensor], images: list[Image.Image]) -> Image.Image:
        self._components = aligned(joint_components(maps), self._components)
        colors = patch_colors(maps, self._components)
        drawn = [map(squares, part) for part in (colors.all, colors.foreground)]
        return sheet([*zip(images, *drawn, strict=True)], ["image", "components", "of the foreground"])

    def _feature_pictures(self, trainer: L.Trainer, pl_module: Any, data: Any) -> dict[str, Image.Image]:
        """Pictures that compare images."""
        plain = bank_of(trainer, pl_module, data, self.num_compared)
        if len(plain.features) < 3:
            return {}
        plain = PlainFeatures(*(part.cpu() for part in plain))  # a Mac's GPU has no float64
        if self._tiles is None or not torch.equal(self._tiles[0], plain.indices):
            self._tiles = plain.indices, tiles_of(trainer, pl_module, data, data.train_images, plain.indices)
        if not trainer.is_global_zero:
            return {}
        points, axes = _projected(plain.features.double().numpy(), self.projection)
        if len(self._tiles[1]) == len(plain.indices):
            content = explored(plain, self._tiles[1], points, axes, data, trainer.current_epoch + 1)
            keep_for_page(trainer, MAP_FILE, content)
        return {
            "neighbours": _neighbors(plain, data.train_images.read, self.num_images),
            "map": _map(plain, points, axes),
        }

    def _keep_errors(self, trainer: L.Trainer, pl_module: Any, data: Any) -> None:
        """Keep what the newest kNN got wrong, with its images."""
        for probe in getattr(trainer, "callbacks", []):
            if isinstance(probe, KNNProbe) and probe.errors is not None:
                page, probe.errors = probe.errors.page(trainer, pl_module, data), None
                if page is not None and trainer.is_global_zero:
                    keep_for_page(trainer, ERRORS_FILE, page)


def _neighbors(plain: PlainFeatures, read: Callable[[int], Tensor], count: int) -> Image.Image:
    """Some images in the first column, each followed by the images with the nearest features."""
    features = F.normalize(plain.features.double(), dim=1)
    queries = torch.linspace(0, len(features) - 1, min(count, len(features))).long()
    similar = features[queries] @ features.T  # (count, N)
    similar[torch.arange(len(queries)), queries] = -2.0  # an image is not its own neighbor
    nearest = similar.topk(min(_NEIGHBORS, len(features) - 1)).indices
    rows = []
    for query, neighbors in zip(queries.tolist(), nearest.tolist(), strict=True):
        row = []
        for index in (query, *neighbors):
            labels = plain.labels[query], plain.labels[index]
            color = _SAME_CLASS if labels[0] == labels[1] else _OTHER_CLASS
            color = "white" if index == query or min(labels) < 0 else color
            row.append(framed(fitted(picture_of(read(int(plain.indices[index])))), color))
        rows.append(row)
    return sheet(rows, ["image", *(f"nearest {number + 1}" for number in range(nearest.shape[1]))])


def _map(plain: PlainFeatures, points: NDArray[np.float64], axes: tuple[str, str]) -> Image.Image:
    """The features as points, colored by class."""
    labels = plain.labels.numpy()
    figure = Figure(figsize=(6, 5), layout="constrained")
    panel = figure.subplots()
    classes = np.unique(labels[labels >= 0])
    if 1 < len(classes) <= 20:
        for number, label in enumerate(classes):
            x, y = points[labels == label].T
            panel.scatter(
                x, y, s=6, color=colormaps["tab10" if len(classes) <= 10 else "tab20"](number), label=str(label)
            )
        panel.legend(title="class", markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    else:
        panel.scatter(points[:, 0], points[:, 1], s=6, c=labels if len(classes) > 1 else None)
    panel.set(xlabel=axes[0], ylabel=axes[1], title=f"features of {len(points):,} training images")
    return _drawn(figure)


def _cell(image: Tensor, mean: Any, std: Any) -> Image.Image:
    return fitted(picture_of(pixels_of(image, mean, std)))


def _projected(features: NDArray[np.float64], how: str) -> tuple[NDArray[np.float64], tuple[str, str]]:
    """Points ``(N, 2)`` of features ``(N, D)``, and the names of the axes."""
    if how == "umap":
        return _umap().UMAP(random_state=0).fit_transform(features), ("UMAP 1", "UMAP 2")
    if how == "tsne":
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(features) - 1) / 3)
        return TSNE(perplexity=perplexity, random_state=0).fit_transform(features), ("t-SNE 1", "t-SNE 2")
    from sklearn.decomposition import PCA

    pca = PCA(2, random_state=0)
    points = pca.fit_transform(features)
    first, second = (
        f"principal component {n + 1} ({share:.0%})" for n, share in enumerate(pca.explained_variance_ratio_)
    )
    return points, (first, second)


def _umap() -> Any:
    try:
        import umap
    except ImportError as error:
        raise UserError(
            'the projection umap needs umap-learn: pip install "ssl_lightning[umap]", or set --pictures.projection to '
            "tsne or pca."
        ) from error
    return umap


def _schedules(trainer: L.Trainer, pl_module: Any) -> Image.Image | None:
    """Learning rate, weight decay and teacher momentum over the whole run; None if its length is unknown."""
    total, optim = trainer.estimated_stepping_batches, getattr(pl_module, "optim", None)
    if optim is None or not 0 < total < float("inf") or not trainer.lr_scheduler_configs:
        return None
    scheduler: Any = trainer.lr_scheduler_configs[0].scheduler
    steps = np.unique(np.linspace(0, total, 201).astype(int))
    curves = {"learning rate": [scheduler.base_lrs[0] * scheduler.lr_lambdas[0](int(step)) for step in steps]}
    curves["weight decay"] = [optim.weight_decay_at(step / total) for step in steps]
    if pl_module.teacher_momentum(0.0) is not None:
        curves["momentum of the teacher"] = [pl_module.teacher_momentum(step / total) for step in steps]
    figure = Figure(figsize=(4 * len(curves), 3), layout="constrained")
    for panel, (name, values) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        panel.plot(steps, values)
        panel.axvline(trainer.global_step, color="gray", linestyle=":")
        panel.set(title=name, xlabel="step")
    return _drawn(figure)


def _drawn(figure: Figure) -> Image.Image:
    file = io.BytesIO()
    figure.savefig(file, dpi=100)
    return Image.open(file).convert("RGB")
