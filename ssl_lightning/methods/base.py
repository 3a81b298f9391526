"""SSLModule: the contract of a method, and its step."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn

from ssl_lightning.backbones import checkpointing, initialization
from ssl_lightning.backbones.names import create_backbone
from ssl_lightning.backbones.own import Backbone, is_own, name_of
from ssl_lightning.backbones.token_dropout import add_token_dropout
from ssl_lightning.backbones.tokens import input_channels
from ssl_lightning.backbones.trainable import Choice, chosen, restrict
from ssl_lightning.checkpoints import check_fit, describe, rename
from ssl_lightning.continued import Continuation, Continued
from ssl_lightning.distributed import world_size
from ssl_lightning.errors import UserError
from ssl_lightning.features import whole_features
from ssl_lightning.optim import Optim
from ssl_lightning.ranges import check_ranges
from ssl_lightning.step_tools import StepTools
from ssl_lightning.training import Checks, FiniteLoss, InitFrom, Steps, begin_with, check_views, prepare


class SSLModule(StepTools):
    """A self-supervised method; a subclass writes ``training_loss``.

    It builds the backbone and the optimizer with its schedule, and hands the features of the training forward to the
    probes. ``SimCLR`` is the example to read.

    Args:
        backbone: Name of a timm or torchvision model, e.g. resnet50, resnet18_cifar, vit_small_patch16_224; or the
            path of a class of your own, ``my_module.MyNet``, in Python also a module itself.
        backbone_kwargs: Arguments that build the backbone, e.g. ``{img_size: 96}``. A checkpoint keeps them, so state
            them for a module of your own, too.
        optim: Optimizer and learning-rate schedule.
        compile: Whether to speed up the backbones with ``torch.compile``; the first steps wait for the compiler. It
            changes the random numbers of stochastic depth.
        checkpoint_blocks: Whether a ViT keeps only the inputs of its blocks and recomputes the rest in the backward
            pass: less memory, a third more time, the same result.
        init_from: Where the backbone and its teacher get their first weights: a checkpoint of this package or another
            project, a folder of timm or transformers, ``hf-hub:NAME``, or the name of a timm or torchvision model.
            Read when a training or an evaluation starts without ``ckpt_path``; positions, patches and the first layer
            of another size are resampled. Heads, optimizer and schedules start as usual.
        continued: How a training goes on from good weights: the heads learn first, then the backbone joins. None
            trains everything from the first step.
        trainable: What trains of the backbone: ``all``; ``norms``; the ``last_blocks``; or ``lora``, low-rank updates
            of a ViT's attention. Everything else in it is frozen and needs little memory; heads always train.
        token_dropout: Share of the patches of each view that the student of a ViT does not see in the first quarter of
            the training, for speed; from there it falls to 0 at three quarters. 0.75 is usual. Teachers and
            evaluation always see all patches. For methods that predict no patches.
    """

    # What the paper prescribes

    views: Any = "simclr"
    """The paper's augmentation: the name of a preset, or a sequence of ViewSpecs. The data module reads it."""

    global_views: int | None = None
    """Number of full-size views that ``training_loss`` takes; None does not check them."""

    local_views: bool = False
    """Whether smaller views may follow."""

    view_cost: float = 3.0
    """Cost of training on a full-size view, in passes of a whole image: 3 is forward and backward."""

    batch_norm: Literal["global", "per_process"] | None = None
    """Whose images BatchNorm sees in the paper: of all processes (``sync_batchnorm``) or of each process."""

    undecayed: tuple[str, ...] = ()
    """Parameters without weight decay, e.g. cls_token, besides all parameters of fewer than two dimensions."""

    zero_init_residual: bool = True
    """Whether the residual branches of a ResNet start at zero."""

    remedies: str = ""
    """What is known to help when nothing is learned; an alarm prints it."""

    collapsed_loss: float | None = None
    """The loss if all outputs are the same, where it is known and differs from the chance loss."""

    probe_every: int | None = None
    """For a method that trains on parts of images: the probes learn from features of whole first views, in eval mode,
    at every ``probe_every``-th step. None takes the features of the training forward."""

    # What the code permits

    drops_tokens: bool = False
    """Whether ``token_dropout`` may hide patches from the backbone: it must be called as a whole."""

    shardable: bool = True
    """Whether ``fsdp2`` can train it: False for a method that sets weights, or uses them before the first step."""

    step_callbacks: tuple[type[L.Callback], ...] = (Steps, InitFrom, Checks, FiniteLoss, Continuation)
    """Callbacks around the steps, added to any Trainer."""

    unsaved_arguments: tuple[str, ...] = ()
    """Arguments that checkpoints leave out, e.g. modules."""

    renamed: dict[str, str] = {}  # noqa: RUF012 # read only
    """Parts of the state that earlier versions saved under another name: old to new."""

    embed_dim: int
    """Width of the features that ``forward`` gives."""

    in_chans: int
    """Number of channels of the images."""

    def __init__(
        self,
        backbone: Backbone = "resnet50",
        backbone_kwargs: dict[str, Any] | None = None,
        optim: Optim = Optim(),
        compile: bool = False,  # noqa: A002 # the word that people look for
        checkpoint_blocks: bool = False,
        init_from: str | None = None,
        continued: Continued | None = None,
        trainable: Choice = "all",
        token_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.optim = Optim(**optim) if isinstance(optim, dict) else optim  # a checkpoint holds a dict
        self.continued = Continued(**continued) if isinstance(continued, dict) else continued
        self.trainable = chosen(trainable)
        self.save_hyperparameters(ignore=["optim", "backbone", *self.unsaved_arguments])
        check_ranges("model", self.hparams)
        backbone_kwargs = backbone_kwargs or {}
        self.save_hyperparameters(  # a method's, too
            {
                "backbone": name_of(backbone),
                "backbone_kwargs": backbone_kwargs,
                "optim": asdict(self.optim),
                "continued": None if self.continued is None else asdict(self.continued),
                "trainable": "all" if self.trainable is None else asdict(self.trainable),
            }
        )
        self.backbone = create_backbone(backbone, **backbone_kwargs)
        self.own_backbone = is_own(backbone)
        if not self.own_backbone and not backbone_kwargs.keys() & {"pretrained", "zero_init_last"}:
            initialization.residual_branches(self.backbone, 0.0 if self.zero_init_residual else 1.0)
        self.backbone.to(memory_format=torch.channels_last)
        self.embed_dim = int(self.backbone.num_features)  # type: ignore[arg-type] # set by create_backbone
        self.in_chans = input_channels(self.backbone) or int(backbone_kwargs.get("in_chans", 3))
        self.pretrained = self.own_backbone or bool(backbone_kwargs.get("pretrained"))  # its weights are to stay
        self._compile, self.checkpoint_blocks, self.init_from = compile, checkpoint_blocks, init_from
        if self.continued is not None and init_from is None and not self.pretrained:
            raise UserError("--model.continued goes on with weights; set --model.init_from to say which.")
        if self.trainable is not None:
            restrict(self.backbone, self.trainable, self.continued is not None and self.continued.train_patch_embed)
        if checkpoint_blocks:
            checkpointing.checkpoint_blocks(self.backbone)
        self.token_dropout = token_dropout
        if token_dropout:
            add_token_dropout(self, token_dropout)

    # The contract of a method

    def training_loss(self, views: Sequence[Tensor]) -> Tensor:
        """The loss of a batch: the only method that a subclass must write.

        Args:
            views: One ``(B, 3, S, S)`` tensor per view, global crops first.
        """
        raise NotImplementedError(f"{type(self).__name__} must define training_loss(views)")

    def update_teacher(self) -> None:
        """Update what follows the weights (teacher, queue, center); called once after each optimizer step."""

    def edit_gradients(self) -> None:
        """Change gradients after Lightning's own clipping, before the optimizer step."""

    def before_first_step(self) -> None:
        """Prepare a training, new or resumed, after its weights are loaded."""

    def forward(self, images: Tensor) -> Tensor:
        """Features ``(B, embed_dim)`` of images ``(B, 3, S, S)``, from the branch that the paper evaluates."""
        return self.evaluated_backbone(images)

    @property
    def evaluated_backbone(self) -> nn.Module:
        """The backbone that the paper evaluates: the probes read its features."""
        return self.backbone

    @property
    def chance_loss(self) -> float | None:
        """The loss of a model that has learned nothing, or None where there is no such value."""
        return None

    @property
    def references(self) -> dict[str, tuple[Callable[[Tensor], Tensor], int]]:
        """What is measured next to the method, by name, each with the width of its features.

        Each is measured once, before the first step: of a run that goes on with weights, the method itself.
        """
        return {} if self.continued is None else {"start": (self, self.embed_dim)}

    def teacher_momentum(self, progress: float) -> float | None:
        """Share of the teacher that stays at a step, given the progress in [0, 1]; None without a teacher."""
        return None

    def pictures(self, images: Tensor) -> dict[str, Tensor]:
        """Pictures to draw next to images ``(B, 3, S, S)``, e.g. reconstructions: same shape, by title."""
        return {}

    def health(self, views: Sequence[Tensor]) -> dict[str, Tensor | float]:
        """Numbers that show the state of the method on a batch; called without gradient, in eval mode."""
        return {}

    def check(self, sizes: list[int], global_batch: int) -> None:
        """Raise a UserError if the method cannot train on views of such sizes in pixels; called before training."""
        check_views(self, sizes, global_batch)

    # The step

    def configure_callbacks(self) -> list[L.Callback]:
        """Callbacks around the steps; an override must return these, too."""
        trainer: Any = self.trainer
        present = {type(callback) for callback in trainer.callbacks}
        return [callback() for callback in self.step_callbacks if callback not in present]

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Loss of a batch, and the features that the probes learn from.

        Args:
            batch: ``(views, labels, ...)``; the labels are not used.
            batch_idx: Number of the batch.
        """
        if self.randomness.seed is None:
            raise UserError(f"{type(self).__name__}.configure_callbacks must return super().configure_callbacks(), too")
        views, self.image_indices = batch[0], getattr(batch, "indices", None)
        images = len(views[0])
        self.global_batch = images * world_size()
        recording = self.recorder.recording(self.evaluated_backbone, images)
        with self.randomness.of_batch(self.global_step, batch_idx, images), recording as features:
            loss = self.training_loss(views)
        self.host_losses.add(loss)
        self.log("train/loss", loss.detach(), batch_size=images)  # prog_bar=True would wait for every step
        if (momentum := self.teacher_momentum(self.progress)) is not None:
            on_device = torch.full((), momentum, device=self.device)  # a number would make the host wait for a GPU
            self.log("train/teacher_momentum", on_device, batch_size=images)
        if self.probe_every is not None:
            features = [whole_features(self, views[0])] if batch_idx % self.probe_every == 0 else []
        return {"loss": loss, "features": torch.cat(features) if features else None}

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Features ``(B, embed_dim)`` of a batch ``(images, labels, ...)``, once for every probe."""
        return self(batch[0])

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Features ``(B, embed_dim)`` of plain images."""
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        """Optimizer and schedule of ``self.optim``, for the global batch over processes and accumulated batches."""
        return self.optim.configure(self)

    @property
    def compiled_parts(self) -> list[nn.Module]:
        """The modules that ``compile`` compiles: they must be called as a whole, not only their parts."""
        return [part for name, part in self.named_children() if name in ("backbone", "teacher_backbone")]

    def configure_model(self) -> None:
        """Compile in place, which changes no name in the state; Lightning calls this before each of its commands."""
        if self._trainer is not None:  # else a checkpoint is being read
            prepare(self, compile=self._compile)

    # Weights

    def begin_with(self, source: str) -> None:
        """Give the backbone and its teacher the weights of a source, see ``init_from``."""
        begin_with(self, source)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what a reader needs to know, also in files of weights only, which callbacks do not see."""
        describe(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rename parts that earlier versions saved, and raise a UserError if the state does not fit the method."""
        rename(checkpoint["state_dict"], self.renamed)
        if self._trainer is not None:  # else load_from_checkpoint, whose caller may want a part
            check_fit(self, checkpoint)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load weights; ``init_from`` is no longer read."""
        self.init_from = None
        return super().load_state_dict(*args, **kwargs)
