"""The command line: LightningCLI with this package's methods, data, probes and defaults."""

import difflib
import inspect
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO, LayerSync
from lightning.pytorch.plugins.environments import ClusterEnvironment, SLURMEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from ssl_lightning.batch_norm import SyncedBatchNorm
from ssl_lightning.callbacks.checkpoint import BestCheckpoint, LastCheckpoint
from ssl_lightning.callbacks.embedding_writer import EmbeddingWriter
from ssl_lightning.callbacks.health_monitor import HealthMonitor
from ssl_lightning.callbacks.knn_probe import KNNProbe
from ssl_lightning.callbacks.linear_probe import LinearProbe
from ssl_lightning.callbacks.loss_floor_alarm import LossFloorAlarm
from ssl_lightning.callbacks.pictures import Pictures
from ssl_lightning.callbacks.processes import FailTogether, Preemption, slurm_job
from ssl_lightning.callbacks.progress import ProgressBar, Throughput
from ssl_lightning.callbacks.run_record import RunRecord
from ssl_lightning.callbacks.view_grid import ViewGrid
from ssl_lightning.checkpoints import AtomicCheckpointIO, export
from ssl_lightning.commands.check import check
from ssl_lightning.commands.plan import plan
from ssl_lightning.data.base import SSLDataModule
from ssl_lightning.errors import UserError
from ssl_lightning.loggers import CSVLogger
from ssl_lightning.methods.base import SSLModule

CALLBACKS: dict[str, type[Callback]] = {
    "run_record": RunRecord,
    "throughput": Throughput,
    "linear_probe": LinearProbe,
    "knn_probe": KNNProbe,
    "best_checkpoint": BestCheckpoint,
    "last_checkpoint": LastCheckpoint,
    "preemption": Preemption,
    "fail_together": FailTogether,
    "progress_bar": ProgressBar,
    "view_grid": ViewGrid,
    "pictures": Pictures,
    "health_monitor": HealthMonitor,
    "loss_floor_alarm": LossFloorAlarm,
    "embedding_writer": EmbeddingWriter,
}
"""Callbacks of every run, each with its options on the command line; the last is for ``predict`` alone.

Throughput comes before the probes, so that their work does not count as the method's.
"""

_OF_TRAINING = {
    "run_record",
    "best_checkpoint",
    "last_checkpoint",
    "preemption",
    "throughput",
    "view_grid",
    "pictures",
    "health_monitor",
    "loss_floor_alarm",
}
"""Callbacks that only fit has."""

_DEFAULTS = {"max_epochs": 100, "log_every_n_steps": 10, "default_root_dir": "runs"}


class SSLArgumentParser(LightningArgumentParser):
    """Answers mistakes in a few lines, where jsonargparse prints every option there is."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong and what to change, and exit with code 2.

        Args:
            message: What jsonargparse says.
            ex: The exception behind it.
        """
        self.exit(2, f"error: {_user_error(ex) or _in_short(message)}\n")


def _user_error(error: BaseException | None) -> UserError | None:
    """The UserError that jsonargparse wrapped into others, if there is one."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def _in_short(message: str) -> str:
    """The message of jsonargparse without its internals, and with the names there are."""
    if unknown := re.search(r'key "(model|data)"(?:.|\n)*Expected a dot import path string: (\S+)', message):
        key, name = unknown.groups()
        names = sorted(_names(SSLModule if key == "model" else SSLDataModule))
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"--{key} {name}: no such class; {hint}Choose from {', '.join(names)}, or give my_module.MyClass."
    noise = ("Subtypes: ", "Errors:", "Given value", "Does not validate", "- Expected a <class 'NoneType'>")
    lines = [line for line in message.splitlines() if line.strip() and not line.strip().startswith(noise)]
    if "is not accepted" in message:
        lines.append("The options are listed by fit --help, fit --model.help CLASS and fit --data.help CLASS.")
    return "\n".join(lines)


def _names(base: type) -> set[str]:
    """Names of the public subclasses known so far."""
    names = {base.__name__} if not base.__name__.startswith("_") and base not in (SSLModule, SSLDataModule) else set()
    return names.union(*map(_names, base.__subclasses__()))


class _Trainer(Trainer):
    """Lightning's, with this package's commands that need a method and its data."""

    def preview(
        self,
        model: SSLModule,
        datamodule: SSLDataModule,
        output: str = "views.png",
        num_rows: int = 8,
        num_images: int = 256,
    ) -> None:
        """Draw images and their views as training sees them, and measure them.

        Args:
            model: The method.
            datamodule: The data.
            output: The picture to write, e.g. a PNG file.
            num_rows: Images in the picture.
            num_images: Images that the printed numbers are about.
        """
        datamodule.views = model.views if datamodule.views is None else datamodule.views
        found = datamodule.preview(num_rows, num_images)
        found.sheet.save(output)
        print(f"{output}\n{found}")

    def plan(self, model: SSLModule, datamodule: SSLDataModule) -> None:
        """Say what fit would do: batch, steps, learning rate, parameters, memory and time by a few steps, and doubts.

        Args:
            model: The method.
            datamodule: The data.
        """
        found = plan(self, model, datamodule)
        if self.is_global_zero:
            print(found)

    def check(
        self,
        model: SSLModule,
        datamodule: SSLDataModule,
        processes: int = 2,
        steps: int = 5,
        batch_size: int | None = None,
    ) -> None:
        """See whether several processes train as one does: same losses, gradients and parameters.

        Args:
            model: The method.
            datamodule: The data.
            processes: Number of processes, on the CPU.
            steps: Optimizer steps.
            batch_size: Images per batch and process; by default that of the data.
        """
        sync_batchnorm = self._accelerator_connector._layer_sync is not None
        found = check(model, datamodule, processes, steps, batch_size, sync_batchnorm)
        print(found)
        if not found.equal:
            raise UserError(f"{found.differing[0]} differ between one process and {processes}.")


class SSLCLI(LightningCLI):
    """LightningCLI whose runs live in ``<trainer.default_root_dir>/<name>/version_<n>``.

    Args:
        args: Words of the command; those of the process by default.
        run: Whether to run a subcommand; else method, data and trainer are only built.
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
                "description": f"Self-supervised vision pretraining. Further commands: {', '.join(_COMMANDS)}.",
            },
            args=args,
            run=run,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Commands with the arguments that the command line does not show."""
        own = {name: {"model", "datamodule"} for name in ("preview", "check", "plan")}
        return {**LightningCLI.subcommands(), **own}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Gather the arguments of the command at hand alone: those of all take a second at every start."""
        if self._first_word in self.subcommands() and self._first_word != subcommand:
            return self.init_parser(**kwargs)
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks of every run."""
        parser.add_argument(
            "--name",
            type=str,
            default=None,
            help="Name of the run: its folder below trainer.default_root_dir; by default that of the method.",
        )
        parser.add_argument(
            "--without",
            type=list[str],
            default=[],
            help=f"Callbacks to leave out, of {', '.join(CALLBACKS)}.",
        )
        for key, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, key)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer with its callbacks, and its loggers unless some are given."""
        without = self._get(self.config, "without")
        if unknown := set(without) - set(CALLBACKS):
            raise UserError(f"--without {', '.join(sorted(unknown))}: choose from {', '.join(CALLBACKS)}.")
        if self.subcommand != "fit":
            without = {*without, *_OF_TRAINING, *(CALLBACKS if self.subcommand == "plan" else [])}
        if self.subcommand != "predict" or self._get(self.config_init, "embedding_writer").output is None:
            without = {*without, "embedding_writer"}
        callbacks = [self._get(self.config_init, key) for key in CALLBACKS if key not in without]
        config = {**self._get(self.config_init, "trainer"), **kwargs}
        if self.subcommand == "plan":
            config |= {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        if self.subcommand != "fit":
            config["logger"] = False
            self.save_config_callback = None
        elif config["logger"] is not False:
            folder, given = self._run_folder, config["logger"]
            version = self._resumed_version() or _new_version(folder, dry=bool(config["fast_dev_run"]))
            where: dict[str, Any] = {"save_dir": folder.parent, "name": folder.name, "version": version}
            own: list[Any] = [CSVLogger(**where), *([TensorBoardLogger(**where)] if given in (None, True) else [])]
            others = given if isinstance(given, list) else [] if given in (None, True) else [given]
            config["logger"] = [*own, *others]
            callbacks.insert(0, _SameFolder(own))
            rank_zero_info(f"Logs and checkpoints: {folder / version}")
        if config["logger"]:
            callbacks.append(LearningRateMonitor("step", log_weight_decay=True))
        config["plugins"] = self._plugins(config)
        return self._instantiate_trainer(config, callbacks)

    def _plugins(self, config: Any) -> list[Any]:
        """Those given, and this package's ways to write checkpoints and to synchronise BatchNorm."""
        plugins = config["plugins"] or []
        plugins = [*plugins] if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        if SLURMEnvironment.detect() and not any(isinstance(plugin, ClusterEnvironment) for plugin in plugins):
            plugins.append(SLURMEnvironment(auto_requeue=False))  # Preemption does it, at the end of a step
        if config["sync_batchnorm"] and not any(isinstance(plugin, LayerSync) for plugin in plugins):
            plugins.append(SyncedBatchNorm())
        return plugins

    @property
    def _run_folder(self) -> Path:
        name = self._get(self.config, "name") or self._get(self.config, "model").class_path.rsplit(".", 1)[-1]
        return Path(self._get(self.config, "trainer").default_root_dir or ".", name)

    def _resumed_version(self) -> str | None:
        """The folder to go on in, if the checkpoint is one of this run's."""
        path = self._get(self.config, "ckpt_path")
        version = None if path is None else Path(path).resolve().parent.parent
        return version.name if version is not None and version.parent == self._run_folder.resolve() else None

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and resolve ``last`` and ``best`` to the newest such checkpoint of the run."""
        super().parse_arguments(parser, args)
        self.subcommand = self.config.get("subcommand")
        path = self._get(self.config, "ckpt_path")
        if self.subcommand == "fit" and int(os.environ.get("SLURM_RESTART_COUNT", "0")):  # the job was requeued
            own = self._run_folder.glob(f"slurm_{slurm_job()}*/checkpoints/last.ckpt")
            if newest := max(own, key=lambda file: file.stat().st_mtime, default=None):
                rank_zero_info(f"requeued: going on from {newest}")
                path = self.config["fit"]["ckpt_path"] = str(newest)
        if path in ("last", "best"):
            found = list(self._run_folder.glob(f"*/checkpoints/{path}*.ckpt"))
            if not found:
                raise UserError(f"no {path}*.ckpt below {self._run_folder}; give its file as ckpt_path, or --name.")
            newest = max(found, key=lambda file: file.stat().st_mtime)
            rank_zero_info(f"ckpt_path {path}: {newest}")
            self.config[self.subcommand]["ckpt_path"] = str(newest)
        elif path is not None and not os.path.isfile(path):
            raise UserError(f"ckpt_path {path} does not exist; give a file, last or best.")

    def _parse_ckpt_path(self) -> None:
        """Lightning's would lay the checkpoint's hyper-parameters over what the command line says."""


class _SameFolder(Callback):
    """Tells all processes the run's folder that the first one made."""

    def __init__(self, loggers: list[Any]) -> None:
        self.loggers = loggers

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Agree, before any other callback asks for the folder."""
        version = trainer.strategy.broadcast(self.loggers[0].version)
        for logger in self.loggers:
            logger._version = version


def _new_version(folder: Path, dry: bool) -> str:
    """The next free folder; the first process makes it, so that two runs which start together get two."""
    taken = [int(path.name[8:]) for path in folder.glob("version_*") if path.name[8:].isdigit()]
    name, number = "version", max(taken, default=-1) + 1
    if SLURMEnvironment.detect():  # where a requeued job finds it
        name, number = f"slurm_{slurm_job()}", len([*folder.glob(f"slurm_{slurm_job()}*")])
    first = getattr(rank_zero_only, "rank", 0) == 0 and os.environ.get("NODE_RANK", "0") == "0"
    while first and not dry:
        try:
            (folder / f"{name}_{number}").mkdir(parents=True)
            break
        except FileExistsError:
            number += 1
    return f"{name}_{number}"


def _find_configs(arguments: Sequence[str]) -> list[str]:
    """Let ``--config configs/...`` name a recipe of the package from any folder."""
    package = Path(__file__).parent
    found = []
    for previous, argument in zip(["", *arguments], arguments, strict=False):
        option, equals, path = argument.partition("=")
        if previous in ("--config", "-c") or (option in ("--config", "-c") and equals):
            prefix, path = (f"{option}=", path) if equals else ("", argument)
            shipped = [root / path for root in (package, package.parent) if (root / path).is_file()]
            argument = prefix + (str(shipped[0]) if shipped and not os.path.exists(path) else path)
        found.append(argument)
    return found


def _benchmark(words: Sequence[str]) -> None:
    """Run ``benchmark``, which measures this package beside lightly."""
    from ssl_lightning.commands.benchmark import pipeline, step

    parser = SSLArgumentParser(prog="ssl-lightning benchmark", description="Measure this package beside lightly.")
    commands = parser.add_subcommands()
    functions: dict[str, Callable[..., Any]] = {"pipeline": pipeline, "step": step}
    for name, function in functions.items():
        command = SSLArgumentParser(description=(function.__doc__ or "").partition("\n")[0])
        command.add_function_arguments(function)
        command.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
        commands.add_subcommand(name, command, help=command.description)
    options = parser.parse_args([_underscored(word) for word in words])
    chosen = options[options.subcommand]
    as_json = chosen.pop("json")
    result = functions[options.subcommand](**chosen)
    print(result.json if as_json else result)


def _evaluate(words: Sequence[str]) -> None:
    """Run ``evaluate``, which says what a backbone is worth on labelled images."""
    from ssl_lightning.commands.evaluate import PROTOCOLS, Evaluation

    parser = SSLArgumentParser(prog="ssl-lightning evaluate", description="Evaluate a backbone on labelled images.")
    commands = parser.add_subcommands()
    for name in PROTOCOLS:
        command = SSLArgumentParser(description=(getattr(Evaluation, name).__doc__ or "").partition("\n")[0])
        command.add_argument("--config", action="config", help="A file with these options.")
        command.add_class_arguments(Evaluation)
        command.add_method_arguments(Evaluation, name)
        commands.add_subcommand(name, command, help=command.description)
    options = parser.parse_args(_with_data_of_the_run([_underscored(word) for word in words]))
    name = options.subcommand
    arguments = vars(parser.instantiate(options)[name])
    arguments.pop("config", None)
    of_protocol = inspect.signature(getattr(Evaluation, name)).parameters.keys() - {"self"}
    chosen = {key: arguments.pop(key) for key in [*arguments] if key in of_protocol}
    result = getattr(Evaluation(**arguments), name)(**chosen)
    if result is not None:  # on the first process
        print(result)


def _with_data_of_the_run(words: list[str]) -> list[str]:
    """Where no ``--data`` is given, that of the run which wrote the checkpoint, but for its views."""
    joined = [word.partition("=")[0] for word in words]
    if "--data" in joined or "--config" in joined or "--checkpoint" not in joined:
        return words
    place = joined.index("--checkpoint")
    checkpoint = words[place].partition("=")[2] or "".join(words[place + 1 : place + 2])
    config = Path(checkpoint).parent.parent / "config.yaml"
    if not Path(checkpoint).is_file() or Path(checkpoint).parent.name != "checkpoints" or not config.is_file():
        return words
    data = (yaml.safe_load(config.read_text()) or {}).get("data")
    if not isinstance(data, dict) or "class_path" not in data:
        return words
    data.get("init_args", {}).pop("views", None)
    return [words[0], "--data", json.dumps(data), *words[1:]]


def _compare(words: Sequence[str]) -> None:
    """Run ``compare``, which puts runs and their evaluations side by side."""
    from ssl_lightning.commands.compare import compare

    parser = SSLArgumentParser(prog="ssl-lightning compare", description="Put runs and their evaluations side by side.")
    parser.add_argument("runs", type=str, nargs="+", help="Folders of fit or evaluate, or folders above them.")
    parser.add_argument("--csv", type=str, default=None, help="Write the table to this CSV file.")
    parser.add_argument("--plot", type=str, default=None, help="Draw the curves of training to this picture, e.g. PNG.")
    options = parser.parse_args(list(words))
    found = compare(options.runs)
    if options.csv is not None:
        found.write_csv(Path(options.csv))
    if options.plot is not None:
        found.draw(Path(options.plot))
    print(found)


def _export(words: Sequence[str]) -> None:
    """Run ``export``, which writes backbones for other programs."""
    parser = SSLArgumentParser(prog="ssl-lightning export", description=(export.__doc__ or "").partition("\n")[0])
    parser.add_function_arguments(export, as_positional=False)
    output = export(**parser.parse_args([_underscored(word) for word in words]))
    print(f"{output}\n{output.with_suffix('.md')}")


def _report(words: Sequence[str]) -> None:
    """Run ``report``, which makes a page of a run."""
    from ssl_lightning.commands.report import report, watch

    parser = SSLArgumentParser(prog="ssl-lightning report", description="Make a page of a run: one file, no network.")
    parser.add_argument("run", type=str, help="Folder of a run, or that above its versions for the newest.")
    parser.add_argument("--output", type=str, default="report.html", help="The page to write.")
    parser.add_argument(
        "--watch", action="store_true", help="Serve the page to this machine instead, renewed as the run goes on."
    )
    parser.add_argument("--port", type=int, default=0, help="Port to serve it at; 0 is a free one.")
    options = parser.parse_args(list(words))
    if options.watch:
        watch(options.run, options.port)
    else:
        print(report(options.run, options.output))


def _underscored(word: str) -> str:
    """``--image-size=32`` as ``--image_size=32``."""
    option, equals, value = word.partition("=")
    return f"--{option[2:].replace('-', '_')}{equals}{value}" if option.startswith("--") else word


_COMMANDS = {
    "benchmark": _benchmark,
    "compare": _compare,
    "evaluate": _evaluate,
    "export": _export,
    "report": _report,
}
"""Commands that are not about training."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: Words of the command; those of the process by default.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # for --model my_module.MyMethod, also from the console script
    # None is for the user to mend: Lightning's use of torch, that validate writes no checkpoints, that data without
    # labels has no validation set, or that all is predicted already.
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")
    warnings.filterwarnings("ignore", "Found .* in eval mode at the start of training")  # what is frozen
    warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
    warnings.filterwarnings("ignore", "Total length of `(list|Loader)` across ranks is zero")
    words = _find_configs(sys.argv[1:] if arguments is None else arguments)
    try:
        if words and words[0] in _COMMANDS:
            _COMMANDS[words[0]](words[1:])
            return
        sys.argv[1:] = words
        SSLCLI()
    except (UserError, MisconfigurationException) as error:
        sys.exit(f"error: {error}")
    except ValueError as error:
        if (cause := _user_error(error)) is None:
            raise
        sys.exit(f"error: {cause}")
