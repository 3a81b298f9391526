"""The command line: LightningCLI with this package's methods, data, probes and defaults, and commands of its own."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO, LayerSync
from lightning.pytorch.plugins.environments import ClusterEnvironment, SLURMEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from ssl_lightning.arguments import SSLArgumentParser, underscored, user_error, with_shipped_configs
from ssl_lightning.batch_norm import SyncedBatchNorm
from ssl_lightning.callbacks.awaited_metrics import AwaitedMetrics
from ssl_lightning.callbacks.checkpoint import BestCheckpoint, LastCheckpoint
from ssl_lightning.callbacks.embedding_writer import EmbeddingWriter
from ssl_lightning.callbacks.forgetting_alarm import ForgettingAlarm
from ssl_lightning.callbacks.health_monitor import HealthMonitor
from ssl_lightning.callbacks.knn_probe import KNNProbe
from ssl_lightning.callbacks.linear_probe import LinearProbe
from ssl_lightning.callbacks.loss_floor_alarm import LossFloorAlarm
from ssl_lightning.callbacks.pictures import Pictures
from ssl_lightning.callbacks.processes import FailTogether, Preemption
from ssl_lightning.callbacks.progress import ProgressBar, Throughput
from ssl_lightning.callbacks.run_header import RunHeader
from ssl_lightning.callbacks.run_record import RunRecord
from ssl_lightning.callbacks.segmentation_probe import SegmentationProbe
from ssl_lightning.callbacks.view_grid import ViewGrid
from ssl_lightning.checkpoints import AtomicCheckpointIO
from ssl_lightning.commands import check, plan, preview
from ssl_lightning.data.base import SSLDataModule
from ssl_lightning.errors import UserError, of_the_machine
from ssl_lightning.loggers import AppendingCSVLogger
from ssl_lightning.machine import flush_denormals
from ssl_lightning.messages import quiet
from ssl_lightning.methods.base import SSLModule
from ssl_lightning.mistakes import dropped_options
from ssl_lightning.runs import (
    BEST_CHECKPOINT,
    LAST_CHECKPOINT,
    new_version,
    newest_checkpoint,
    removed_if_refused,
    requeued_checkpoint,
    version_of,
)

STANDALONE = ("benchmark", "compare", "curate", "evaluate", "export", "prepare", "report", "show", "sweep")
"""Commands without a Trainer: each is a module of ``commands``, imported only when it runs."""

CALLBACKS: dict[str, type[Callback]] = {
    "run_record": RunRecord,
    "throughput": Throughput,
    "linear_probe": LinearProbe,
    "knn_probe": KNNProbe,
    "segmentation_probe": SegmentationProbe,
    "best_checkpoint": BestCheckpoint,
    "last_checkpoint": LastCheckpoint,
    "preemption": Preemption,
    "fail_together": FailTogether,
    "progress_bar": ProgressBar,
    "view_grid": ViewGrid,
    "pictures": Pictures,
    "health_monitor": HealthMonitor,
    "loss_floor_alarm": LossFloorAlarm,
    "forgetting_alarm": ForgettingAlarm,
    "embedding_writer": EmbeddingWriter,
}
"""Callbacks of every run, each with its options on the command line; only ``predict`` has ``embedding_writer``.

Throughput comes before the probes, so that their work does not count as the method's.
"""

_ONLY_IN_FIT = {
    "run_record",
    "best_checkpoint",
    "last_checkpoint",
    "preemption",
    "throughput",
    "view_grid",
    "pictures",
    "health_monitor",
    "segmentation_probe",
    "loss_floor_alarm",
    "forgetting_alarm",
}

_DEFAULTS = {"log_every_n_steps": 10, "default_root_dir": "runs"}
_MAX_EPOCHS = 100
"""The default where nothing else ends the training."""

_HELP = {
    "trainer.max_epochs": f"Stop after this many epochs; -1 for no limit. By default {_MAX_EPOCHS}, or no limit if "
    "--trainer.max_steps or --trainer.max_time is given.",
    "trainer.enable_model_summary": "Whether to print a table of the method's parts; the first lines of a run give its "
    "size without it.",
}
"""Help of Trainer options that mean something else here."""


class _Trainer(Trainer):
    """Lightning's Trainer: epochs, devices, precision, loggers and so on."""

    check = check.run
    plan = plan.run
    preview = preview.run


class SSLCLI(LightningCLI):
    """LightningCLI whose runs live in ``<trainer.default_root_dir>/<name>/version_<n>``.

    Args:
        args: Words of the command line; None takes the words this process was started with.
        run: Whether to run a subcommand; if not, only the method, the data and the trainer are built.
    """

    def __init__(self, args: list[str] | None = None, run: bool = True) -> None:
        self._first_word = next(iter(sys.argv[1:] if args is None else args), None)
        super().__init__(
            SSLModule,
            SSLDataModule,
            trainer_class=_Trainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            trainer_defaults=_DEFAULTS,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            parser_class=SSLArgumentParser,
            parser_kwargs={
                "prog": "ssl-lightning",
                "description": f"Self-supervised vision pretraining. Further commands: {', '.join(STANDALONE)}.",
            },
            args=args,
            run=run,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Commands, with their arguments that the command line does not show."""
        own = {name: {"model", "datamodule"} for name in ("preview", "check", "plan")}
        return {**LightningCLI.subcommands(), **own}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Gather the arguments of the chosen command only: gathering them for all commands takes a second."""
        if self._first_word in self.subcommands() and self._first_word != subcommand:
            return self.init_parser(**kwargs)
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    def setup_parser(self, *args: Any) -> None:
        """Name all commands to the parser, for its messages."""
        super().setup_parser(*args)
        parser: Any = self.parser
        parser.further_commands = STANDALONE

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks of every run."""
        parser.add_argument(
            "--name",
            type=str,
            default=None,
            help="Name of the run, and of its folder in --trainer.default_root_dir; by default the name of the method.",
        )
        parser.add_argument(
            "--without",
            type=list[str],
            default=[],
            help=f"List of callbacks to leave out, from {', '.join(CALLBACKS)}.",
        )
        for key, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, key)
        for action in parser._actions:
            action.help = _HELP.get(action.dest, action.help)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer with its callbacks, and its loggers unless some are given."""
        without = self._get(self.config, "without")
        if unknown := set(without) - set(CALLBACKS):
            raise UserError(f"--without {', '.join(sorted(unknown))}: choose from {', '.join(CALLBACKS)}.")
        if self.subcommand != "fit":
            without = {*without, *_ONLY_IN_FIT, *(CALLBACKS if self.subcommand == "plan" else [])}
        if self.subcommand != "predict" or self._get(self.config_init, "embedding_writer").output is None:
            without = {*without, "embedding_writer"}
        if "segmentation_probe" not in without and self._get(self.config_init, "segmentation_probe").data is None:
            without = {*without, "segmentation_probe"}
        config = {**self._get(self.config_init, "trainer"), **kwargs}
        config["enable_model_summary"] = bool(config["enable_model_summary"])
        if config["barebones"]:
            config |= dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
            config["log_every_n_steps"] = None
        own = config["callbacks"] or []
        own = own if isinstance(own, list) else [own]
        ours = {key: self._get(self.config_init, key) for key in CALLBACKS if key not in without}
        callbacks = [callback for key, callback in ours.items() if not _replaced(key, callback, config, own)]
        if self.subcommand == "plan":
            config |= {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
            own = []
        if self.subcommand != "fit":
            config["logger"] = False
            self.save_config_callback = None
        else:
            callbacks = [*self._loggers(config), *callbacks, RunHeader(), AwaitedMetrics()]
            # after the callbacks that log what it watches
            callbacks += [callback for callback in own if isinstance(callback, EarlyStopping)]
            own = [callback for callback in own if not isinstance(callback, EarlyStopping)]
        if config["logger"] and not any(isinstance(callback, LearningRateMonitor) for callback in own):
            callbacks.append(LearningRateMonitor("step", log_weight_decay=True))
        config["callbacks"], config["plugins"] = own, self._plugins(config)
        if config["accumulate_grad_batches"] < 1:
            raise UserError("--trainer.accumulate_grad_batches must be at least 1.")
        try:
            return self._instantiate_trainer(config, callbacks)
        except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
            if user_error(error) is not None:
                raise
            raise UserError(f"the options of --trainer do not fit: {error}") from error

    def _loggers(self, config: Any) -> list[Callback]:
        """Set the loggers of the run and its folder; returns what keeps the folder the same on all processes."""
        folder, given = self._named_folder, config["logger"]
        resumed = self._get(self.config, "ckpt_path")
        version = version_of(resumed, folder) if resumed is not None else None
        if given is False and config["enable_checkpointing"] is False:
            self.save_config_callback = None  # nothing is kept
            return []
        version = version or new_version(folder, dry=bool(config["fast_dev_run"]))
        if given is False:  # so that checkpoints lie in a folder of the run, as usual
            config["default_root_dir"] = str(folder / version)
            return []
        where: dict[str, Any] = {"save_dir": folder.parent, "name": folder.name, "version": version}
        own: list[Any] = [AppendingCSVLogger(**where), *([TensorBoardLogger(**where)] if given in (None, True) else [])]
        others = given if isinstance(given, list) else [] if given in (None, True) else [given]
        config["logger"] = [*own, *others]
        return [_OneVersion(own)]

    def _plugins(self, config: Any) -> list[Any]:
        """The given plugins, and this package's ways to write checkpoints and to synchronize BatchNorm."""
        plugins = config["plugins"] or []
        plugins = [*plugins] if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        if SLURMEnvironment.detect() and not any(isinstance(plugin, ClusterEnvironment) for plugin in plugins):
            plugins.append(SLURMEnvironment(auto_requeue=False))  # Preemption requeues, at the end of a step
        if config["sync_batchnorm"] and not any(isinstance(plugin, LayerSync) for plugin in plugins):
            plugins.append(SyncedBatchNorm())
        return plugins

    @property
    def _named_folder(self) -> Path:
        """The folder of all versions of the run."""
        name = self._get(self.config, "name") or self._get(self.config, "model").class_path.rsplit(".", 1)[-1]
        return Path(self._get(self.config, "trainer").default_root_dir or ".", name)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and let ``last`` and ``best`` name the newest such checkpoint of the run."""
        super().parse_arguments(parser, args)
        self.subcommand = self.config.get("subcommand")
        _set_max_epochs(self._get(self.config, "trainer"))
        words = sys.argv[1:] if args is None else args
        for sentence in dropped_options(words, self._get(self.config, "model"), self._get(self.config, "data")):
            rank_zero_info(sentence)
        path = self._get(self.config, "ckpt_path")
        requeued = self.subcommand == "fit" and int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        if requeued and (newest := requeued_checkpoint(self._named_folder)):
            rank_zero_info(f"requeued: going on from {newest}")
            path = self.config["fit"]["ckpt_path"] = str(newest)
        if path in (LAST_CHECKPOINT, BEST_CHECKPOINT):
            newest = newest_checkpoint(self._named_folder, path)
            if newest is None:
                raise UserError(
                    f"there is no {path}*.ckpt below {self._named_folder}; set --ckpt_path to a file, or --name."
                )
            rank_zero_info(f"ckpt_path {path}: {newest}")
            self.config[self.subcommand]["ckpt_path"] = str(newest)
        elif path is not None and not os.path.isfile(path):
            raise UserError(f"--ckpt_path {path} does not exist; give a file, last or best.")

    def _parse_ckpt_path(self) -> None:
        """Keep the command line's values: Lightning would replace them by the checkpoint's hyperparameters."""


def _set_max_epochs(trainer: Any) -> None:
    """Give the number of epochs its default, unless something else ends the training."""
    given = trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks or {}]
    timed = trainer.max_time is not None or any(one.get("class_path", "").endswith(".Timer") for one in given)
    if trainer.max_epochs is None:
        trainer.max_epochs = -1 if trainer.max_steps != -1 or timed else max(_MAX_EPOCHS, trainer.min_epochs or 0)


def _replaced(key: str, callback: Callback, config: Any, own: list[Any]) -> bool:
    """Whether a callback is switched off, or the user's own callback of its kind takes its place."""
    kinds: dict[str, tuple[type, str]] = {
        "progress_bar": (LightningProgressBar, "enable_progress_bar"),
        "best_checkpoint": (ModelCheckpoint, "enable_checkpointing"),
        "last_checkpoint": (ModelCheckpoint, "enable_checkpointing"),
    }
    if any(isinstance(given, type(callback)) for given in own):
        return True
    if key not in kinds:
        return False
    kind, switch = kinds[key]
    others = [given for given in own if not isinstance(given, BestCheckpoint | LastCheckpoint)]
    return config[switch] is False or any(isinstance(given, kind) for given in others)


class _OneVersion(Callback):
    """Gives the loggers of all processes the version that the first process chose."""

    def __init__(self, loggers: list[Any]) -> None:
        self.loggers = loggers

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Agree before any other callback asks for the run folder."""
        version = trainer.strategy.broadcast(self.loggers[0].version)
        for logger in self.loggers:
            logger._version = version


def _of_the_trainer(error: BaseException) -> bool:
    """Whether Lightning's Trainer refused its options."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and frame.tb_frame.f_globals["__name__"].startswith(
        ("lightning.pytorch", "lightning.fabric")
    )


class _Parsed(SSLCLI):
    """Parses the command line, and does no more."""

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def check_words(words: Sequence[str]) -> None:
    """Answer mistakes of a command line as the command itself does, without running it.

    Args:
        words: The command line.
    """
    before = [*sys.argv]
    sys.argv[1:] = underscored(with_shipped_configs(words))
    try:
        _Parsed()
    finally:
        sys.argv[:] = before


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: Words of the command line; None takes the words this process was started with.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # for --model my_module.MyMethod, also from the console script
    quiet()
    flush_denormals()
    try:
        words = underscored(with_shipped_configs(sys.argv[1:] if arguments is None else arguments))
        if words and words[0] in STANDALONE:
            run = import_module(f"ssl_lightning.commands.{words[0]}").run
            run(words[1:], *([check_words] if words[0] == "sweep" else []))  # commands do not import the command line
            return
        sys.argv[1:] = words
        with removed_if_refused():
            SSLCLI()
    except (UserError, MisconfigurationException) as error:
        sys.exit(f"error: {error}")
    except ValueError as error:
        if (cause := user_error(error)) is None and not _of_the_trainer(error):
            raise
        sys.exit(f"error: {cause or str(error).strip()}")
    except (OSError, RuntimeError) as error:  # torch reports a worker that was killed at any moment of the step
        if (machine := of_the_machine(error)) is None:
            raise
        sys.exit(f"error: {machine}")
