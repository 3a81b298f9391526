"""Callbacks around the steps of every method; ``SSLModule`` adds them to any Trainer.

They do what must not depend on hooks of the method: a subclass may override any hook of Lightning without ``super()``
and still trains to the same weights. They keep no state of a method between two trainings.
"""

import copy
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins import DoublePrecision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ssl_lightning.backbones import own
from ssl_lightning.backbones.drop_path import DropPath
from ssl_lightning.backbones.low_rank import merge
from ssl_lightning.backbones.token_dropout import TokenDropout
from ssl_lightning.backbones.tokens import only_size
from ssl_lightning.batch_norm import SyncBatchNorm
from ssl_lightning.checkpoints import describe, settle_progress, weights_for
from ssl_lightning.distributed import gather, reduced, world_size
from ssl_lightning.errors import UserError
from ssl_lightning.schedules import token_dropout


class Steps(L.Callback):
    """Seeds each step, sets its weight decay, and calls ``edit_gradients`` before and ``update_teacher`` after it.

    It uses hooks of the optimizer: they run once per real step, also with accumulated batches. They do not run for a
    step that 16-mixed skips because its gradients overflowed.
    """

    def __init__(self) -> None:
        self._loaded_seed: int | None = None

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Convert to double precision before a checkpoint is loaded; Lightning converts after it, which rounds."""
        if isinstance(trainer.precision_plugin, DoublePrecision):
            pl_module.double()

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Agree on the seed, and hook into the optimizer."""
        seed = torch.initial_seed() % 2**63 if self._loaded_seed is None else self._loaded_seed
        pl_module.randomness.seed, self._loaded_seed = trainer.strategy.broadcast(seed), None
        parts = pl_module.modules() if world_size() > 1 else ()
        pl_module.randomness.drop_paths = [part for part in parts if isinstance(part, DropPath)]
        pl_module.randomness.token_dropouts = [
            part for part in pl_module.backbone.modules() if isinstance(part, TokenDropout)
        ]
        pl_module.forget_deferred()  # values of a step that was interrupted

        def before(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            pl_module.optim.set_weight_decay(optimizer, pl_module.progress)
            if (closure := kwargs.get("closure")) is None:  # 16-mixed computes the gradients before the step
                pl_module.edit_gradients()
                return None

            def then_edit() -> Any:
                result = closure()  # forward, backward, and Lightning's clipping
                pl_module.edit_gradients()
                return result

            return args, {**kwargs, "closure": then_edit}

        def after(optimizer: Any, *_: Any) -> None:
            if not getattr(optimizer, "found_inf", None):  # set by 16-mixed for optimizers that skip steps on their own
                pl_module.update_teacher()

        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(before)
            optimizer.register_step_post_hook(after)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Set the share of the patches that the step drops."""
        for part in pl_module.randomness.token_dropouts:
            part.drop_prob = token_dropout(pl_module.token_dropout, pl_module.progress)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Save the seed, what the weights are, and the progress as it will be after this batch."""
        checkpoint["step_seed"] = pl_module.randomness.seed
        describe(pl_module, checkpoint)
        if trainer.state.fn == TrainerFn.FITTING:
            settle_progress(checkpoint["loops"]["fit_loop"], trainer.fit_loop)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Restore the seed, and prepare images as the checkpoint does."""
        if (prepare_as := getattr(getattr(trainer, "datamodule", None), "prepare_as", None)) is not None:
            prepare_as(checkpoint.get("image_transform", {}))
        if trainer.state.fn == TrainerFn.FITTING:
            self._loaded_seed = checkpoint.get("step_seed")


class InitFrom(L.Callback):
    """Gives a method the weights of ``init_from``, unless a checkpoint was loaded."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Read the weights, show the first images to a backbone that asks for them, and let the method prepare."""
        self._begin(pl_module)
        begin_with_images(trainer, pl_module)
        pl_module.before_first_step()

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Read the weights."""
        self._begin(pl_module)

    on_test_start = on_predict_start = on_validation_start

    def _begin(self, pl_module: Any) -> None:
        source, pl_module.init_from = pl_module.init_from, None  # only once: a second training keeps its weights
        if source is not None:
            pl_module.begin_with(source)


class Checks(L.Callback):
    """Checks views, batch, precision and BatchNorm against what the paper prescribes, before the first step."""

    def __init__(self) -> None:
        self._checked = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Check what is known before the first batch.

        Raises:
            UserError: The method cannot train with these settings; the message says what to change.
        """
        if hasattr(pl_module, "teacher_backbone") and pl_module.dtype in (torch.float16, torch.bfloat16):
            raise UserError(
                "a teacher in half precision never moves; set --trainer.precision to bf16-mixed or 32-true."
            )
        if getattr(pl_module, "chunk_size", None) and pl_module.token_dropout:
            raise UserError("chunks are computed twice, on the same patches; set --model.token_dropout to 0.")
        check_batch_norm(pl_module, trainer.world_size)
        data: Any = getattr(trainer, "datamodule", None)
        specs = getattr(data, "view_specs", None)
        self._checked = specs is not None
        if specs is not None:
            batch = data.batch_size * trainer.world_size
            pl_module.check(_sizes(specs), batch)
            if small := getattr(data, "small_view_specs", ()):
                try:
                    pl_module.check(_sizes(small), batch)
                except UserError as error:
                    raise UserError(f"--data.resolution asks for smaller views in the first epochs: {error}") from error

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Check the first batch of a loader that does not say which views it makes."""
        if not self._checked:
            pl_module.check([view.shape[-1] for view in batch[0]], len(batch[0][0]) * trainer.world_size)
            self._checked = True


def _sizes(specs: Any) -> list[int]:
    return [spec.size for spec in specs for _ in range(spec.count)]


class FiniteLoss(L.Callback):
    """Stops if the loss of any process is not finite, before it reaches the weights."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Forget the losses of a step that was interrupted."""
        pl_module.host_losses.clear()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Look at the losses of the step.

        Raises:
            UserError: A loss is nan or infinite.
        """
        for loss in pl_module.host_losses.take():
            pl_module.last_loss = loss
            if not abs(loss) < float("inf"):
                raise UserError(
                    f"the loss is {loss} at step {trainer.global_step} (epoch {trainer.current_epoch}); the weights "
                    "have not changed in that step. Lower --model.optim.base_lr or raise "
                    "--model.optim.warmup_epochs, and under 16-mixed try --trainer.precision bf16-mixed or 32."
                )


class HostLosses:
    """Copies losses from the device to the host without making the device wait."""

    def __init__(self) -> None:
        self._copies: list[tuple[Tensor, torch.Event | None]] = []

    def add(self, loss: Tensor) -> None:
        """Start copying the mean of a loss over the processes.

        Args:
            loss: Scalar.
        """
        total = reduced(loss.detach().float())
        if not total.is_cuda:
            self._copies.append((total.cpu(), None))
            return
        host = torch.empty_like(total, device="cpu", pin_memory=True).copy_(total, non_blocking=True)
        copied = torch.Event(total.device)
        copied.record()
        self._copies.append((host, copied))

    def take(self) -> list[float]:
        """The losses since the last call; waits for the forward pass, not for the backward pass behind it."""
        copies, self._copies = self._copies, []
        for _, copied in copies:
            if copied is not None:
                copied.synchronize()
        return [float(host.numpy()) / world_size() for host, _ in copies]

    def clear(self) -> None:
        """Forget all losses."""
        self._copies = []


def check_batch_norm(method: Any, processes: int) -> None:
    """Check whose images BatchNorm sees.

    Args:
        method: Its ``batch_norm`` says whose images the paper's BatchNorm sees.
        processes: Number of processes that train together.

    Raises:
        UserError: BatchNorm is synchronized, but the paper's is per process.
    """
    name = type(method).__name__
    layers = [module for module in method.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    synced = [layer for layer in layers if isinstance(layer, nn.SyncBatchNorm | SyncBatchNorm)]
    if method.batch_norm == "per_process" and synced:
        raise UserError(f"{name}'s BatchNorm is per process; set --trainer.sync_batchnorm to false.")
    if method.batch_norm == "global" and len(synced) < len(layers) and processes > 1:
        rank_zero_warn(f"{name}'s BatchNorm is global; set --trainer.sync_batchnorm to true.")


def check_views(method: Any, sizes: Sequence[int], global_batch: int) -> None:
    """Check whether a method can train on views of these sizes.

    Args:
        method: It says how many views it takes, and its backbone which sizes.
        sizes: Side of each view in pixels.
        global_batch: Images per batch over all processes.

    Raises:
        UserError: It cannot; the message says which option to change.
    """
    count = method.global_views
    if count is not None and (
        list(sizes[:count]) != [max(sizes)] * count or (len(sizes) > count and not method.local_views)
    ):
        others = "smaller ones may follow" if method.local_views else "and no others"
        raise UserError(
            f"{type(method).__name__} needs {count} view{'s' * (count > 1)} of full size, {others}; --data.views or "
            f"--data.transform gives {', '.join(f'{size} px' for size in sizes)}."
        )
    if global_batch < 2:
        raise UserError("a batch of 1 image has no BatchNorm and no negatives; set --data.batch_size to 2 or more.")
    patch = getattr(method.backbone, "patch_side", 1)
    for size in dict.fromkeys(sizes):
        if size % patch:
            raise UserError(
                f"the backbone's patches of {patch} px do not divide views of {size} px; set --data.image_size, "
                "the sizes in --data.views, or the backbone's patches in --model.backbone_kwargs."
            )
        if size < (smallest := getattr(method.backbone, "smallest_side", 1)):
            raise UserError(
                f"views of {size} px are too small for the backbone, which needs {smallest} px; set --data.image_size, "
                "the sizes in --data.views, or fewer blocks in --model.backbone_kwargs."
            )
        if (only := only_size(method.backbone)) not in (None, size):
            raise UserError(
                f"the backbone takes images of {only} px only, not views of {size} px; set "
                "--model.backbone_kwargs.img_size, --data.image_size or the sizes in --data.views."
            )
        if method.own_backbone and not any(isinstance(weight, DTensor) for weight in method.parameters()):
            own.check_size(method.backbone, size)


def begin_with(method: Any, source: str) -> None:
    """Load the weights of a source into the backbone of a method and its teacher.

    Args:
        method: Has a ``backbone``, and perhaps a ``teacher_backbone``.
        source: See ``init_from`` of SSLModule.

    Raises:
        UserError: The weights do not fit the backbone; the message says what differs.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    own_network = merge(copy.deepcopy(method.backbone)) if method.own_backbone else None
    try:
        weights: Any = weights_for(source, own_network or method.hparams["backbone"], method.hparams["backbone_kwargs"])
    except UserError as error:
        raise UserError(f"--model.init_from {source} does not fit the model: {error}") from error
    adapted = method.trainable is not None and method.trainable.lora is not None  # whose updates are not in the source
    options = StateDictOptions(full_state_dict=True, strict=not adapted)
    for part in (method.backbone, getattr(method, "teacher_backbone", None)):
        if part is not None:
            set_model_state_dict(part, weights, options=options)  # sharded ones, too
    rank_zero_info(f"{type(method).__name__} begins with the backbone of {source}")


def begin_with_images(trainer: Any, method: nn.Module) -> None:
    """Show the first view of the first batch of all processes to each part of a method that asks for it.

    Args:
        trainer: The trainer of the training.
        method: Its backbones, or parts of them, may define ``begin_with_images(images)``, which is called with
            ``(B, C, S, S)`` before the first step, but not when a training resumes, e.g. ``backbones.whitened``.
    """
    parts: list[Any] = [part for part in method.modules() if hasattr(part, "begin_with_images")]
    if parts and trainer.global_step == 0:
        batch = trainer.strategy.batch_to_device(next(iter(trainer.train_dataloader)))
        images = gather(batch[0][0].contiguous())
        for part in parts:
            part.begin_with_images(images)


def prepare(method: Any, compile: bool) -> None:  # noqa: A002 # the word that people look for
    """Check the strategy of the trainer, and compile in place: names in the state stay the same.

    Args:
        method: Its ``compiled_parts`` are compiled.
        compile: Whether to compile.

    Raises:
        UserError: The strategy is one of Lightning's that shard.
    """
    if type(method.trainer.strategy) in (FSDPStrategy, ModelParallelStrategy):
        raise UserError("only this package's strategy can shard a method; set --trainer.strategy to fsdp2.")
    for part in method.compiled_parts if compile else ():
        if part._compiled_call_impl is None:
            part.compile()
