"""SSLModule: what all methods share."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from ssl_lightning.backbones.checkpointing import checkpoint_blocks as let_blocks_be_checkpointed
from ssl_lightning.backbones.drop_path import DropPath
from ssl_lightning.backbones.initialization import init_residual_branches
from ssl_lightning.backbones.names import create_backbone
from ssl_lightning.backbones.tokens import only_size
from ssl_lightning.batch_norm import SyncBatchNorm
from ssl_lightning.checkpoints import check_fit, settle_progress, weights_for
from ssl_lightning.distributed import own_part, reduced, world_size
from ssl_lightning.errors import UserError
from ssl_lightning.optim import Optim


class SSLModule(L.LightningModule):
    """Base of all methods: subclass it and write ``training_loss``.

    It builds the backbone, the optimizer with its schedule, and hands the features of the training forward to the
    probes. ``SimCLR`` is the example to read.

    Args:
        backbone: Name of a timm or torchvision model, e.g. resnet50, resnet18_cifar, vit_small_patch16_224.
        backbone_kwargs: Arguments of the backbone's builder, e.g. ``{img_size: 96}``.
        optim: Optimizer and learning-rate schedule.
        compile: Whether ``torch.compile`` makes the backbones faster; the first steps wait for it. The random numbers
            of stochastic depth become others.
        checkpoint_blocks: Whether a ViT keeps the inputs of its blocks alone and computes the rest again in the
            backward pass: less memory, a third more time, the same result.
        init_from: Weights that the backbone, and its teacher, begin with: a checkpoint of this package or an official
            one, or the name of a timm or torchvision model. Read when a training or an evaluation starts without
            ``ckpt_path``. Heads, optimizer and schedules begin as without it.
    """

    views: Any = "simclr"
    """The paper's augmentation: the name of a preset, or a sequence of ViewSpecs. The data module reads it."""

    embed_dim: int
    """Width of the features that ``forward`` gives."""

    # What the paper prescribes

    global_views: int | None = None
    """Number of full-size views that ``training_loss`` takes; None leaves them unchecked."""

    local_views: bool = False
    """Whether smaller views may follow."""

    batch_norm: Literal["global", "per_process"] | None = None
    """Whose images BatchNorm sees in the paper: those of all processes (``sync_batchnorm``) or of one."""

    undecayed: tuple[str, ...] = ()
    """Names of parameters that weight decay spares, beside those of fewer than two dimensions, e.g. cls_token."""

    zero_init_residual: bool = True
    """Whether the residual branches of a ResNet start at zero."""

    remedies: str = ""
    """What is known to help when nothing is learnt; an alarm says it."""

    collapsed_loss: float | None = None
    """The loss of outputs that are all the same, where it is known and not the chance loss."""

    probe_every: int | None = None
    """Steps between those whose views, whole and in eval mode, have features for the probes: for a method that trains
    on parts of them. None takes the features of the training forward."""

    # What the code permits

    shardable: bool = True
    """Whether ``fsdp2`` can train it: False for a method that sets weights, or uses them before the first step."""

    unsaved_arguments: tuple[str, ...] = ()
    """Arguments that checkpoints leave out, e.g. modules."""

    def __init__(
        self,
        backbone: str = "resnet50",
        backbone_kwargs: dict[str, Any] | None = None,
        optim: Optim = Optim(),
        compile: bool = False,  # noqa: A002 # the word that people look for
        checkpoint_blocks: bool = False,
        init_from: str | None = None,
    ) -> None:
        super().__init__()
        self.optim = Optim(**optim) if isinstance(optim, dict) else optim  # a checkpoint holds a dict
        self.save_hyperparameters(ignore=["optim", *self.unsaved_arguments])
        backbone_kwargs = backbone_kwargs or {}
        self.save_hyperparameters({"optim": asdict(self.optim), "backbone_kwargs": backbone_kwargs})  # a method's, too
        self.backbone = create_backbone(backbone, **backbone_kwargs)
        if not backbone_kwargs.keys() & {"pretrained", "zero_init_last"}:
            init_residual_branches(self.backbone, 0.0 if self.zero_init_residual else 1.0)
        self.backbone.to(memory_format=torch.channels_last)
        self.embed_dim = int(self.backbone.num_features)  # type: ignore[arg-type]
        self._compile, self.checkpoint_blocks, self._init_from = compile, checkpoint_blocks, init_from
        if checkpoint_blocks:
            let_blocks_be_checkpointed(self.backbone)
        self._pending_losses: list[tuple[Tensor, torch.Event | None]] = []
        self._pending: list[Tensor] = []
        self._recorded: list[Tensor] = []
        self._to_record = 0
        self._seed: int | None = None
        self._loaded_seed: int | None = None
        self._drop_paths: list[Any] = []
        self._generator: torch.Generator | None = None
        self._checked = False
        self.image_indices: Tensor | None = None
        """Indices ``(B,)`` of the images of the training batch in the data set; None from a loader without them."""
        self.last_loss: float | None = None
        """Loss of the newest batch, once it is on the host: what the progress bar shows without waiting."""

    # The contract of a method

    def training_loss(self, views: Sequence[Tensor]) -> Tensor:
        """The loss of a batch: the one method a subclass writes.

        Args:
            views: One ``(B, 3, S, S)`` tensor per view, global crops first.

        Returns:
            Scalar.
        """
        raise NotImplementedError(f"{type(self).__name__} must define training_loss(views)")

    def forward(self, images: Tensor) -> Tensor:
        """Features ``(B, embed_dim)`` of images ``(B, 3, S, S)``, from the branch that the paper evaluates."""
        return self.evaluated_backbone(images)

    @property
    def evaluated_backbone(self) -> nn.Module:
        """The backbone that the paper evaluates: the probes read its features."""
        return self.backbone

    def update_teacher(self) -> None:
        """Move what follows the weights (teacher, queue, centre); called once after each optimizer step."""

    def teacher_momentum(self, progress: float) -> float | None:
        """Share of the teacher that stays at a step; None without a teacher.

        Args:
            progress: Share of the training done, in [0, 1].
        """
        return None

    def pictures(self, images: Tensor) -> dict[str, Tensor]:
        """What the method makes of images, to be drawn beside them: by title, ``(B, 3, S, S)`` normalised alike.

        Args:
            images: ``(B, 3, S, S)``, in eval mode and without gradient.
        """
        return {}

    def _take_pending(self) -> list[Tensor]:
        """What the batches of the step left for ``update_teacher``: keys, embeddings, mean logits."""
        pending, self._pending = self._pending, []
        return pending

    def check(self, sizes: list[int], global_batch: int) -> None:
        """See whether the method can train on such views; called before training starts.

        Args:
            sizes: Side of each view in pixels.
            global_batch: Images per step over all processes, accumulated batches not counted.

        Raises:
            UserError: It cannot; says which argument to change.
        """
        count = self.global_views
        if count is not None and (
            sizes[:count] != [max(sizes)] * count or (len(sizes) > count and not self.local_views)
        ):
            others = "smaller ones may follow" if self.local_views else "and no others"
            raise UserError(
                f"{type(self).__name__} needs {count} view{'s' * (count > 1)} of full size, {others}; data.views gives "
                f"{', '.join(f'{size} px' for size in sizes)}."
            )
        if global_batch < 2:
            raise UserError("a batch of 1 image has no BatchNorm and no negatives; set data.batch_size to 2 or more.")
        patch = getattr(self.backbone, "patch_side", 1)
        for size in sizes:
            if size % patch:
                raise UserError(
                    f"the backbone's patches of {patch} px do not divide views of {size} px; set data.image_size, "
                    "the sizes in data.views, or model.backbone_kwargs.patch_size."
                )
            if (only := only_size(self.backbone)) not in (None, size):
                raise UserError(
                    f"the backbone takes images of {only} px alone, not views of {size} px; set "
                    "model.backbone_kwargs.img_size, data.image_size or the sizes in data.views."
                )

    @property
    def chance_loss(self) -> float | None:
        """The loss of a model that has learnt nothing, or None where there is no such value."""
        return None

    def health(self, views: Sequence[Tensor]) -> dict[str, Tensor | float]:
        """Numbers that tell the state of the method on a batch; called without gradient, in eval mode.

        Args:
            views: As for ``training_loss``.
        """
        return {}

    @property
    def progress(self) -> float:
        """Optimizer steps done, as a share of those planned, in [0, 1]; 0 outside a training."""
        return self.progress_of(self.global_step)

    def progress_of(self, step: int) -> float:
        """Share of the planned optimizer steps that are done before a step, in [0, 1].

        Args:
            step: Optimizer steps done.
        """
        return 0.0 if self._trainer is None else min(1.0, step / max(1, self.trainer.estimated_stepping_batches))

    @property
    def generator(self) -> torch.Generator:
        """Random numbers of the step, on the CPU: the same on every process and after a resume."""
        return self._generator or torch.default_generator

    def seeds_of_images(self, images: int) -> list[int]:
        """A seed for each image of this process's batch, the same on any number of processes and after a resume.

        Args:
            images: Images of this process.
        """
        return own_part(torch.randint(2**62, (images * world_size(),), generator=self.generator)).tolist()

    def random_to_device(self, host: Tensor) -> Tensor:
        """Move what ``generator`` drew to the device, without waiting for it.

        Args:
            host: Tensor on the CPU.
        """
        return host.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else host

    @property
    def compiled_parts(self) -> list[nn.Module]:
        """The modules that ``compile`` is about: those that are called, not only their parts."""
        return [part for name, part in self.named_children() if name in ("backbone", "teacher_backbone")]

    def configure_model(self) -> None:
        """Compile in place, which changes no name in the state; Lightning calls this before each of its commands."""
        if self._trainer is None:  # a checkpoint is being read
            return
        if type(self.trainer.strategy) in (FSDPStrategy, ModelParallelStrategy):
            raise UserError("methods are sharded by this package's strategy; set trainer.strategy to fsdp2.")
        if self._compile:
            for part in self.compiled_parts:
                if part._compiled_call_impl is None:
                    part.compile()

    # Before the first step or evaluation, once a checkpoint would be there

    def on_train_start(self) -> None:
        """Give the backbone and its teacher the weights of ``init_from``, unless a checkpoint has brought others.

        Raises:
            UserError: They are not those of such a backbone; says what differs.
        """
        source, self._init_from = self._init_from, None  # once: a second training goes on with what it finds
        if source is not None:
            self.begin_with(source)

    on_validation_start = on_test_start = on_predict_start = on_train_start

    def begin_with(self, source: str) -> None:
        """Give the backbone and its teacher the weights of a source.

        Args:
            source: See ``init_from``.

        Raises:
            UserError: They are not those of such a backbone; says what differs.
        """
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        try:
            weights: Any = weights_for(source, self.hparams["backbone"], self.hparams["backbone_kwargs"])
        except UserError as error:
            raise UserError(f"model.init_from {source} does not fit the model: {error}") from error
        for part in (self.backbone, getattr(self, "teacher_backbone", None)):
            if part is not None:
                set_model_state_dict(part, weights, options=StateDictOptions(full_state_dict=True))  # sharded ones, too
        rank_zero_info(f"{type(self).__name__} begins with the backbone of {source}")

    # Training

    def on_fit_start(self) -> None:
        """Check the views, the batch and BatchNorm against what the paper prescribes."""
        several = world_size() > 1
        self._drop_paths = [module for module in self.modules() if several and isinstance(module, DropPath)]
        self._pending, self._pending_losses = [], []  # of a step that was interrupted
        seed = self._loaded_seed if self._loaded_seed is not None else torch.initial_seed() % 2**63
        self._seed, self._loaded_seed = self.trainer.strategy.broadcast(seed), None
        if hasattr(self, "teacher_backbone") and self.dtype in (torch.float16, torch.bfloat16):
            raise UserError("a teacher in half precision never moves; set trainer.precision to bf16-mixed or 32-true.")
        self._check_batch_norm()
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        specs = getattr(data, "view_specs", None)
        self._checked = specs is not None
        if specs is not None:
            sizes = [spec.size for spec in specs for _ in range(spec.count)]
            self.check(sizes, data.batch_size * self.trainer.world_size)

    def _check_batch_norm(self) -> None:
        layers = [module for module in self.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        synced = [layer for layer in layers if isinstance(layer, nn.SyncBatchNorm | SyncBatchNorm)]
        if self.batch_norm == "per_process" and synced:
            raise UserError(f"{type(self).__name__}'s BatchNorm is per process; set trainer.sync_batchnorm to false.")
        if self.batch_norm == "global" and len(synced) < len(layers) and self.trainer.world_size > 1:
            rank_zero_warn(f"{type(self).__name__}'s BatchNorm is global; set trainer.sync_batchnorm to true.")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Check the first batch of a loader that does not tell its views."""
        if not self._checked:
            self.check([view.shape[-1] for view in batch[0]], len(batch[0][0]) * self.trainer.world_size)
            self._checked = True

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Loss of a batch, and the features that the probes learn from.

        Args:
            batch: ``(views, labels, ...)``; the labels are not looked at.
            batch_idx: Number of the batch.
        """
        views, self.image_indices = batch[0], getattr(batch, "indices", None)
        with self._seeded(batch_idx, len(views[0])), self._recording(len(views[0])) as features:
            loss = self.training_loss(views)
        self._pending_losses.append(_to_host(reduced(loss.detach().float())))
        self.log("train/loss", loss.detach(), batch_size=len(views[0]))  # prog_bar=True would wait for every step
        if (momentum := self.teacher_momentum(self.progress)) is not None:
            self.log("train/teacher_momentum", momentum, batch_size=len(views[0]))
        if self.probe_every is not None:
            features = [self._whole_features(views[0])] if batch_idx % self.probe_every == 0 else []
        return {"loss": loss, "features": torch.cat(features) if features else None}

    @torch.no_grad()
    def _whole_features(self, images: Tensor) -> Tensor:
        """Features of whole images in eval mode."""
        self.evaluated_backbone.eval()
        features = self(images)
        self.evaluated_backbone.train()
        return features

    @contextmanager
    def _seeded(self, batch_idx: int, batch_size: int) -> Iterator[None]:
        """Make the random numbers of a step (masks, drop path) depend on the seed and the step alone.

        They are the same on all processes; masks and drop path take the rows of the process, dropout's repeat.
        """
        step = (self._seed or 0, self.trainer.global_step, batch_idx)
        self._generator = torch.Generator().manual_seed(_mixed(*step))
        torch.manual_seed(_mixed(*step, 1))
        for drop_path in self._drop_paths:
            drop_path.batch_size = batch_size
        try:
            yield
        finally:
            self._generator = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the seed of the steps, and what tells a reader whose weights these are."""
        checkpoint["step_seed"] = self._seed
        checkpoint["method"], checkpoint["ssl_lightning_version"] = type(self).__name__, version("ssl_lightning")
        checkpoint["method_bases"] = [base.__name__ for base in type(self).__mro__ if issubclass(base, SSLModule)]
        evaluated = self.evaluated_backbone
        checkpoint["evaluated_backbone"] = next(name for name, part in self.named_modules() if part is evaluated)
        if self._trainer is None:
            return
        checkpoint["metrics"] = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if hasattr(data, "image_transform"):
            checkpoint["image_transform"], checkpoint["facts"] = data.image_transform, data.facts
        if self.trainer.state.fn == TrainerFn.FITTING:
            settle_progress(checkpoint["loops"]["fit_loop"], self.trainer.fit_loop)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the seed of the steps, and see whether the weights are those of such a method.

        Raises:
            UserError: They are not; says what differs.
        """
        self._init_from = None
        if self._trainer is None:  # load_from_checkpoint, whose caller may want a part
            return
        self._loaded_seed = checkpoint.get("step_seed")
        changed = check_fit(self, checkpoint)
        if changed and self.trainer.state.fn == TrainerFn.FITTING:
            rank_zero_warn(f"going on with other hyper-parameters than the checkpoint's: {'; '.join(changed)}")

    @contextmanager
    def _recording(self, images: int) -> Iterator[list[Tensor]]:
        """Record the detached features of the evaluated backbone, so that probes need no forward of their own.

        Args:
            images: How many it takes; they may come in several passes.
        """
        features, self._to_record = self._recorded, images
        hook = self.evaluated_backbone.register_forward_hook(lambda _module, _inputs, output: self.record(output))
        try:
            yield features
        finally:
            hook.remove()
            self._recorded, self._to_record = [], 0

    def record(self, features: Tensor) -> None:
        """Hand features of the training images to the probes: for methods that call parts of the evaluated backbone.

        Args:
            features: ``(B, embed_dim)``; more than the images of the batch, as of further views, are left out.
        """
        if sum(map(len, self._recorded)) < self._to_record:
            self._recorded.append(features.detach())

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stop at a loss that is not finite on any process, before it reaches the weights of all.

        Raises:
            UserError: The loss is nan or infinite.
        """
        pending, self._pending_losses = self._pending_losses, []
        for value, copied in pending:
            if copied is not None:
                copied.synchronize()  # waits for the forward pass; the backward pass is queued behind and runs on
            self.last_loss = loss = float(value.numpy()) / world_size()
            if not abs(loss) < float("inf"):
                raise UserError(
                    f"the loss is {loss} at step {self.trainer.global_step} (epoch {self.current_epoch}); the weights "
                    "are as before that step. Lower model.optim.base_lr or lengthen the warm-up, and under 16-mixed "
                    "try trainer.precision bf16-mixed or 32."
                )

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, then move the teacher: not after a step that 16-mixed skips, as its gradients overflowed."""
        self.optim.set_weight_decay(optimizer, self.progress)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = scaler and scaler.get_scale()
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if scaler and scaler.get_scale() < scale:  # how torch says that it skipped
            self._take_pending()
        else:
            self.update_teacher()

    def configure_optimizers(self) -> Any:
        """Optimizer and schedule of ``self.optim``, for the global batch over processes and accumulated batches."""
        return self.optim.configure(self)

    # Evaluation: the features once, for every probe

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Features of plain images; the probes read them.

        Args:
            batch: ``(images, labels, ...)``.
            batch_idx: Unused.
        """
        return self(batch[0])

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Features of plain images; the probes read them."""
        return self(batch[0])

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Features ``(B, embed_dim)`` of plain images."""
        return self(batch[0])


def _mixed(*numbers: int) -> int:
    """One seed of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def _to_host(loss: Tensor) -> tuple[Tensor, "torch.Event | None"]:
    """Start copying a loss to the host; the device does not wait."""
    if not loss.is_cuda:
        return loss.cpu(), None
    host = torch.empty_like(loss, device="cpu", pin_memory=True).copy_(loss, non_blocking=True)
    copied = torch.Event(loss.device)
    copied.record()
    return host, copied
