"""Distillation from frozen teachers."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from ssl_lightning import losses
from ssl_lightning.backbones.maps import features_and_map, fitting_side
from ssl_lightning.backbones.own import undisturbed
from ssl_lightning.backbones.tokens import called_blocks
from ssl_lightning.checkpoints.pretrained import image_transform_of
from ssl_lightning.errors import UserError
from ssl_lightning.heads import Standardizer, moments, same_grid
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.optim import Optim, clip_together
from ssl_lightning.teachers import FrozenTeacher


class Distillation(SSLModule):
    """Distillation: predict the features of a frozen teacher, of whole images and of their places.

    Any network learns from any other without labels, also from several. The mixture of losses is AM-RADIO's (Ranzinger
    et al. 2024, https://arxiv.org/abs/2312.06709), the same view for both is from Beyer et al. 2022, Knowledge
    distillation: A good teacher is patient and consistent, https://arxiv.org/abs/2106.05237; the rest is our own
    recipe. Features are centered, because they share a large common vector, and divided by a single number. Linear
    layers predict them, so that the student's own features hold them. Long trainings help more than anything else. For
    CNNs set ``optim.weight_decay`` to 1e-4. Teachers are not saved with the checkpoint: keep their files. They compute
    in the precision of the trainer.

    Args:
        teacher: Where the frozen teacher comes from, as for ``init_from``: a checkpoint of this package or another
            project, a folder of timm or transformers, ``hf-hub:NAME``, or the name of a timm or torchvision model; in
            Python also a module. A list for several teachers, whose losses are averaged.
        teacher_kwargs: Arguments that build the teachers, e.g. ``{img_size: 96}``; ``backbone`` in it names the network
            of a file that does not, and ``branch`` one of several networks in a file.
        teacher_size: Side in pixels of the images that teachers see. None is the side of the view, rounded to the
            teacher's patches.
        teacher_channels: Which channels of the images teachers see, counted from 0, e.g. ``[3, 2, 1]`` of 13 bands; a
            single channel is repeated. None is all.
        cosine_weight: Weight of the cosine distance; the smooth L1 distance has weight 1 minus it.
        patch_weight: Weight of the loss of places; the loss of whole images has weight 1. 0 leaves it out.
        adapter: What predicts the teacher's features from the student's: ``linear``, or ``mlp`` with a hidden layer,
            which fits better and leaves less in the student.
        standardize_steps: Steps whose batches give mean and scale of the teacher's features.
        clip_gradient: Largest norm of the gradient of all parameters together; 0 for no clipping.
        optim: Optimizer and learning-rate schedule.
        kwargs: See SSLModule.
    """

    views, global_views = "distillation", 1
    remedies = "less drop path, a higher learning rate, a teacher that sees larger images"
    unsaved_arguments = ("teacher",)
    pixel_mean: Tensor
    pixel_std: Tensor
    projectors: Any
    teacher_statistics: Any

    def __init__(
        self,
        teacher: str | list[str] | nn.Module | list[nn.Module] = "", teacher_kwargs: dict[str, Any] | None = None,
        teacher_size: int | None = None, teacher_channels: list[int] | None = None,
        cosine_weight: float = 0.9, patch_weight: float = 1.0, adapter: Literal["linear", "mlp"] = "linear",
        standardize_steps: int = 50, clip_gradient: float = 1.0,
        optim: Optim = Optim("adamw", 1e-3 / 32, lr_scaling="sqrt", weight_decay=0.05, warmup_epochs=5),
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(optim=optim, **kwargs)
        self.cosine_weight, self.patch_weight, self.adapter = cosine_weight, patch_weight, adapter
        self.standardize_steps, self.clip_gradient = standardize_steps, clip_gradient
        sources = [*teacher] if isinstance(teacher, list | tuple) else [teacher]
        self.save_hyperparameters({"teacher": [source if isinstance(source, str) else "" for source in sources]})
        self._sources = sources
        self._read = functools.partial(
            FrozenTeacher, kwargs=teacher_kwargs or {}, size=teacher_size, channels=teacher_channels
        )
        self._teachers: tuple[FrozenTeacher, ...] = ()  # in a tuple, so that they are no part of the method
        self.projectors, self.teacher_statistics = nn.ModuleDict(), nn.ModuleDict()  # of the teachers' widths
        usual = image_transform_of(self.backbone)  # ImageNet's
        for name, other in (("mean", 0.0), ("std", 1.0)):
            values = torch.tensor(usual[name] if self.in_chans == 3 else [other] * self.in_chans)
            self.register_buffer(f"pixel_{name}", values.view(-1, 1, 1), persistent=False)

    def training_loss(self, views: Sequence[Tensor]) -> Tensor:
        """Distances from the teachers' standardized features: of whole images, and of places."""
        terms = [
            (self.patch_weight if name.startswith("patch") else 1.0)
            * losses.distillation(predictions, targets, self.cosine_weight)
            for name, predictions, targets in self.predicted(views[0])
        ]
        return torch.stack(terms).sum() / len(self.teachers)

    def update_teacher(self) -> None:
        """Count the features of the step in the teachers' statistics, as long as these are not fixed."""
        for name, statistics in self.teacher_statistics.items():
            for batch in self.deferred(name):
                statistics.add(batch)

    def edit_gradients(self) -> None:
        """Clip the gradient by its norm."""
        clip_together(self.parameters(), self.clip_gradient)

    def predicted(self, images: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, predictions and standardized targets ``(N, D)`` of each term of the loss.

        Args:
            images: ``(B, C, S, S)``, normalized as the student sees them.
        """
        teachers = self.teachers
        features, grid = features_and_map(self.backbone, images)  # (B, D), (B, D', h, w)
        self.record(features)
        for number, teacher in enumerate(teachers):
            targets, target_grid = teacher(self.pixels(images))
            yield self._term(f"image{number}", features, targets)
            if (name := f"patch{number}") in self.projectors and grid is not None and target_grid is not None:
                yield self._term(name, *(part.flatten(2).mT.flatten(0, 1) for part in same_grid(grid, target_grid)))

    def _term(self, name: str, features: Tensor, targets: Tensor) -> tuple[str, Tensor, Tensor]:
        batch = None
        if self.training and self.global_step < self.standardize_steps:
            batch = moments(targets)
            self.defer(**{name: batch})
        return name, self.projectors[name](features), self.teacher_statistics[name](targets, batch)

    def pixels(self, images: Tensor) -> Tensor:
        """Values from 0 to 1 of images ``(B, C, S, S)`` that are normalized as the student sees them."""
        return images * self.pixel_std + self.pixel_mean

    # The teachers

    @property
    def teachers(self) -> tuple[FrozenTeacher, ...]:
        """The frozen teachers, read when they are first needed; with them, what predicts their features is built.

        Raises:
            UserError: There is no such teacher.
        """
        if self._teachers:
            return self._teachers
        if not self._sources or "" in self._sources:
            raise UserError(
                "Distillation learns from a frozen network; set --model.teacher to a checkpoint or to the name of a "
                "timm or torchvision model, e.g. vit_base_patch14_reg4_dinov2.lvd142m."
            )
        teachers = tuple(self._read(source) for source in self._sources)
        width, map_width = self._widths()
        for number, teacher in enumerate(teachers):
            target_width, target_map_width = teacher.check(fitting_side(self.backbone, 64), self.in_chans)
            self._add_term(f"image{number}", width, target_width)
            if map_width is not None and target_map_width is not None:
                self._add_term(f"patch{number}", map_width, target_map_width)
            elif self.patch_weight > 0:
                rank_zero_info(
                    f"Distillation predicts only whole images of {teacher.name}: "
                    f"{'the backbone' if map_width is None else 'the teacher'} does not show its map of places."
                )
        self._teachers = teachers
        return teachers

    def _widths(self) -> tuple[int, int | None]:
        """Widths of the features and of the map of the student."""
        side, weight = fitting_side(self.backbone, 64), next(self.backbone.parameters())
        images = torch.zeros(1, self.in_chans, side, side, dtype=weight.dtype, device=weight.device)
        with undisturbed(self.backbone):
            features, grid = features_and_map(self.backbone, images)
        return features.shape[1], None if grid is None else grid.shape[1]

    def _add_term(self, name: str, width: int, target_width: int) -> None:
        if name in self.projectors or (name.startswith("patch") and self.patch_weight == 0):
            return
        weight = next(self.backbone.parameters())
        with torch.device("cpu"):
            head: nn.Module = nn.Linear(width, target_width)
            if self.adapter == "mlp":
                hidden = [nn.Linear(width, 2048), nn.LayerNorm(2048), nn.GELU(), nn.Linear(2048, target_width)]
                head = nn.Sequential(*hidden)
        self.projectors[name] = head.to(weight.device, weight.dtype)
        self.teacher_statistics[name] = Standardizer(target_width).to(weight.device, weight.dtype)

    def configure_model(self) -> None:
        """Read the teachers before the optimizer is built."""
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            _ = self.teachers
        super().configure_model()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build what predicts the features of teachers, which need not be there."""
        state = checkpoint["state_dict"]
        for name in (key.split(".")[1] for key in state if key.startswith("teacher_statistics.")):
            first = next(value for key, value in state.items() if key.startswith(f"projectors.{name}."))
            self._add_term(name, first.shape[1], state[f"teacher_statistics.{name}.moments"].shape[1])
        super().on_load_checkpoint(checkpoint)

    def before_first_step(self) -> None:
        """See how the data normalizes images, to undo it for the teachers."""
        specs = getattr(getattr(self.trainer, "datamodule", None), "view_specs", None)
        if specs is None:
            rank_zero_info("Distillation takes views of this loader as normalized by ImageNet's mean and deviation.")
            return
        for buffer, values in ((self.pixel_mean, specs[0].mean), (self.pixel_std, specs[0].std)):
            buffer.copy_(buffer.new_tensor(values).view(-1, 1, 1))

    def check(self, sizes: list[int], global_batch: int) -> None:
        """The teachers must take the views."""
        super().check(sizes, global_batch)
        if self.dtype in (torch.float16, torch.bfloat16):
            raise UserError(
                "half precision cannot hold the statistics of a teacher; set --trainer.precision to bf16-mixed or "
                "32-true."
            )
        for teacher in self.teachers:
            teacher.check(sizes[0], self.in_chans)

    # What is known about the training

    @property
    def compiled_parts(self) -> list[nn.Module]:
        """The largest parts of the student that are called as a whole."""
        if not hasattr(self.backbone, "forward_features"):
            return [self.backbone]
        return called_blocks(self.backbone) if hasattr(self.backbone, "blocks") else [*self.backbone.children()]

    @property
    def references(self) -> dict[str, tuple[Callable[[Tensor], Tensor], int]]:
        """What the student is compared with, by name, each with the width of its features: itself, and the teachers."""
        references: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {"start": (self, self.embed_dim)}
        for number, teacher in enumerate(self.teachers):
            name = f"teacher_{number + 1}" if len(self.teachers) > 1 else "teacher"
            references[name] = self._features_of(teacher), self.teacher_statistics[f"image{number}"].dim
        return references

    def _features_of(self, teacher: FrozenTeacher) -> Callable[[Tensor], Tensor]:
        return lambda images: teacher(self.pixels(images))[0]

    def health(self, views: Sequence[Tensor]) -> dict[str, Tensor | float]:
        """Cosine and explained variance of each term, neighbors that student and teacher share, the teacher's scale."""
        readings: dict[str, list[Tensor]] = {}
        neighbors = _neighbors(self(views[0]).float())
        for name, predictions, targets in self.predicted(views[0]):
            term, predictions = name.rstrip("0123456789"), predictions.to(targets.dtype)
            unexplained = (predictions - targets).square().mean() / targets.square().mean()
            readings.setdefault(f"{term}_agreement", []).append(F.cosine_similarity(predictions, targets).mean())
            readings.setdefault(f"{term}_explained", []).append(1 - unexplained)
            if term == "image":
                shared = (neighbors[:, :, None] == _neighbors(targets)[:, None]).any(2)
                readings.setdefault("neighbors_shared", []).append(shared.float().mean())
                readings.setdefault("teacher_scale", []).append(self.teacher_statistics[name].scale)
        return {name: torch.stack(values).mean() for name, values in readings.items()}

    @property
    def chance_loss(self) -> float:
        """The loss of predictions that are all zero, of targets with a normal distribution; .42423 is its smooth L1."""
        patches = any(name.startswith("patch") for name in self.projectors) or not self._teachers
        return (self.cosine_weight + (1 - self.cosine_weight) * 0.4242347) * (1 + self.patch_weight * patches)


def _neighbors(features: Tensor, count: int = 5) -> Tensor:
    """Indices ``(B, k)`` of the rows that are nearest to each row, by cosine similarity around the mean."""
    rows = F.normalize(features - features.mean(0), dim=1)
    similarities = (rows @ rows.T).fill_diagonal_(-2)
    return similarities.topk(min(count, len(rows) - 1), dim=1).indices
