"""The folder of a run: what it is called, what it holds, and how to find it.

::

    <trainer.default_root_dir>/<name>/version_<n>/   slurm_<job>_<n> in a SLURM job
        config.yaml                                  the options of the command line
        metrics.csv                                  every logged value
        environment.json                             each start: command line, versions, hardware, and how it ended
        warnings.txt                                 the warnings of this package
        unreadable-<process>.txt                     images that could not be read
        slurm.json                                   in a SLURM job: which of its fits this is
        views.png                                    the views at the start of training
        pictures/<picture>/<epoch>.png               what the method has learned so far
        map.json                                     the newest map of the features, with its images
        errors.json                                  the newest errors of kNN, with their images
        blank.json                                   views of the last batch that show nothing
        checkpoints/last.ckpt, best.ckpt             and epoch_<n>.ckpt of --last_checkpoint.keep_epochs
        evaluations/<protocol>/results.json          one folder for each evaluation
"""

import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from ssl_lightning.errors import UserError

CONFIG_FILE = "config.yaml"  # Lightning's name, as is the next
METRICS_FILE = "metrics.csv"
ENVIRONMENT_FILE = "environment.json"
WARNINGS_FILE = "warnings.txt"
SLURM_FILE = "slurm.json"
VIEWS_FILE = "views.png"
MAP_FILE = "map.json"
ERRORS_FILE = "errors.json"
BLANK_FILE = "blank.json"
RESULTS_FILE = "results.json"
LAST_CHECKPOINT, BEST_CHECKPOINT = "last", "best"
CHECKPOINTS_FOLDER = "checkpoints"  # Lightning's name
EVALUATIONS_FOLDER = "evaluations"
PICTURES_FOLDER = "pictures"
_UNREADABLE_FILE = "unreadable-{}.txt"
_WRITTEN_FIRST = {CONFIG_FILE, "hparams.yaml", ENVIRONMENT_FILE, WARNINGS_FILE, VIEWS_FILE, SLURM_FILE}
_made: list[Path] = []
"""Run folders that this process has made."""


# Names


def picture_file(name: str, epoch: int) -> str:
    """Path of a picture inside the run folder.

    Args:
        name: What the picture shows.
        epoch: Epochs done when it was drawn.
    """
    return f"{PICTURES_FOLDER}/{name}/{epoch:04d}.png"


def unreadable_file(process: int) -> str:
    """Name of the file that lists the images a process could not read.

    Args:
        process: Rank of the process.
    """
    return _UNREADABLE_FILE.format(process)


def new_version(folder: Path, dry: bool) -> str:
    """Name of the next free version. The first process creates its folder, so two runs that start together get two.

    Args:
        folder: ``<trainer.default_root_dir>/<name>``.
        dry: Whether to create nothing.
    """
    numbers = [int(path.name[8:]) for path in folder.glob("version_*") if path.name[8:].isdigit()]
    slurm = SLURMEnvironment.detect()
    name, number = "version", max(numbers, default=-1) + 1
    if slurm:  # a requeued job finds its folder by this name
        name, number = _slurm_version(), len([*folder.glob(f"{_slurm_version()}_*")])
    first = getattr(rank_zero_only, "rank", 0) == 0 and os.environ.get("NODE_RANK", "0") == "0"
    while first and not dry:
        try:
            (folder / f"{name}_{number}").mkdir(parents=True)
            _made.append(folder / f"{name}_{number}")
            break
        except FileExistsError:
            number += 1
        except OSError as error:
            raise UserError(
                f"cannot make the folder of the run, {folder / f'{name}_{number}'}: {error.strerror}. Set "
                "--trainer.default_root_dir to a folder that can be written."
            ) from error
    if slurm and first and not dry:
        _write_fit(folder / f"{name}_{number}", {**_this_fit(), "restarts": [_restart()]})
    return f"{name}_{number}"


@contextmanager
def removed_if_refused() -> Iterator[None]:
    """Remove the run folders that ``new_version`` makes if an exception ends the run before its first step.

    A folder stays if it holds more than what is written before, such as a list of unreadable images.
    """
    _made.clear()
    try:
        yield
    except BaseException:
        for folder in _made:
            names = [path.name for path in folder.rglob("*") if path.is_file()]
            stepped = any("chance_loss" in start for start in read_starts(folder))  # written after the first batch
            if not stepped and all(name in _WRITTEN_FIRST or "tfevents" in name for name in names):
                shutil.rmtree(folder, ignore_errors=True)
        raise


def _this_fit() -> dict[str, Any]:
    """Distinguishes this ``fit`` from others of its SLURM job: its command line, and its step if srun started it."""
    return {"command": sys.argv[1:], "step": os.environ.get("SLURM_STEP_ID")}


def _restart() -> int:
    """How often the SLURM job was requeued."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _write_fit(folder: Path, fit: dict[str, Any]) -> None:
    with suppress(OSError):
        (folder / SLURM_FILE).write_text(json.dumps(fit), encoding="utf-8")


def slurm_job() -> str:
    """Name of this SLURM job for ``scontrol``: ``<array>_<task>`` within an array."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def _slurm_version() -> str:
    return f"slurm_{slurm_job()}"


def new_evaluation(checkpoint: str, protocol: str, output: str | None = None) -> Path:
    """A free folder for the results of an evaluation.

    Args:
        checkpoint: A checkpoint file, or the name of a backbone.
        protocol: Name of the evaluation.
        output: Parent folder; None is ``evaluations`` in the checkpoint's run, or next to a checkpoint outside any run.
    """
    path = Path(checkpoint)
    if output is not None:
        above = Path(output)
    elif path.is_file():
        above = (run_of(path) or path.parent) / EVALUATIONS_FOLDER
    else:
        above = Path(EVALUATIONS_FOLDER) / path.name
    names = itertools.chain([protocol], (f"{protocol}_{number}" for number in itertools.count(1)))
    return next(above / name for name in names if not (above / name).exists())


# Finding runs and their checkpoints


def run_folder(trainer: L.Trainer) -> Path | None:
    """The run folder of a trainer: the folder of its first logger that has one; None if no logger has a folder.

    Args:
        trainer: The trainer.
    """
    return next((Path(logger.log_dir) for logger in trainer.loggers if logger.log_dir is not None), None)


def run_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint lies in; None if it lies elsewhere.

    Args:
        checkpoint: The file.
    """
    return checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINTS_FOLDER else None


def version_of(checkpoint: str, folder: Path) -> str | None:
    """The version that a checkpoint belongs to; None if it is of another run.

    Args:
        checkpoint: The file.
        folder: ``<trainer.default_root_dir>/<name>``.
    """
    version = Path(checkpoint).resolve().parent.parent
    return version.name if version.parent == folder.resolve() else None


def newest_checkpoint(folder: Path, name: str) -> Path | None:
    """The newest checkpoint of that name in any version of a run.

    Args:
        folder: ``<trainer.default_root_dir>/<name>``.
        name: ``last`` or ``best``.
    """
    return _newest(folder.glob(f"*/{CHECKPOINTS_FOLDER}/{name}*.ckpt"))


def requeued_checkpoint(folder: Path) -> Path | None:
    """The ``last.ckpt`` that this ``fit`` wrote before its SLURM job was requeued; None if it wrote none.

    A job may run several fits of the same name. A fit is known by its command line, and by its step if srun started it.
    Without srun, fits with the same command line continue in the order in which they were first started.

    Args:
        folder: ``<trainer.default_root_dir>/<name>``.
    """
    this, restart = _this_fit(), _restart()
    versions = folder.glob(f"{_slurm_version()}_*")
    for version in sorted(versions, key=lambda path: int(path.name.rsplit("_", 1)[1])):
        last, fit = version / CHECKPOINTS_FOLDER / f"{LAST_CHECKPOINT}.ckpt", {}
        with suppress(OSError, ValueError):
            fit = json.loads((version / SLURM_FILE).read_text(encoding="utf-8"))
        if not last.is_file() or {key: fit.get(key) for key in this} != this:
            continue
        if this["step"] is None:  # a single process: the next fit with this command line continues the next run
            if restart in fit["restarts"]:
                continue
            _write_fit(version, {**fit, "restarts": [*fit["restarts"], restart]})
        return last
    return None


def newest_run(path: str) -> Path:
    """A run folder, or the newest run folder directly below.

    Args:
        path: Folder of a run or of its versions, or a file in it.

    Raises:
        UserError: There is no run.
    """
    root = _folder(path)
    for folders in ([root], [entry for entry in root.iterdir() if entry.is_dir()]):
        times = {folder: last_written(folder, METRICS_FILE, CONFIG_FILE, ENVIRONMENT_FILE) for folder in folders}
        if runs := {folder: time for folder, time in times.items() if time is not None}:
            return max(runs, key=lambda folder: runs[folder])
    raise UserError(
        f"{path} is not a run: neither it nor a folder in it holds {METRICS_FILE} or {CONFIG_FILE}. "
        "Give runs/<name>/version_<n>, or runs/<name> for its newest version."
    )


def runs_below(path: str) -> list[Path]:
    """All run folders at or below a path, followed by the evaluations that belong to none of them.

    Args:
        path: A folder, or a file in it.

    Raises:
        UserError: There is neither a run nor an evaluation.
    """
    root = _folder(path)
    logged = (file.parent for file in root.rglob(METRICS_FILE) if EVALUATIONS_FOLDER not in file.parts)
    runs = sorted(folder for folder in logged if not (folder / RESULTS_FILE).exists())
    evaluations = sorted(file.parent for file in root.rglob(RESULTS_FILE))
    separate = [folder for folder in evaluations if not any(run in folder.parents for run in runs)]
    if not runs and not separate:
        raise UserError(f"{root} holds neither a {METRICS_FILE} of fit nor a {RESULTS_FILE} of evaluate.")
    return [*runs, *separate]


def last_written(folder: Path, *names: str) -> float | None:
    """When the newest of these files was written, in seconds since 1970; None if there are none.

    Args:
        folder: The run folder.
        names: Names of the files.
    """
    files = (folder / name for name in names)
    return max((file.stat().st_mtime for file in files if file.is_file()), default=None)


def _folder(path: str) -> Path:
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist; give the folder of a run, e.g. runs/SimCLR or runs/SimCLR/version_0.")
    return Path(path).parent if os.path.isfile(path) else Path(path)


def _newest(files: Iterable[Path]) -> Path | None:
    return max(files, key=lambda file: file.stat().st_mtime, default=None)


# Reading


def read_config(folder: Path) -> dict[str, Any]:
    """The ``config.yaml`` of a run; empty if it is missing or damaged.

    Args:
        folder: The run folder.
    """
    file = folder / CONFIG_FILE
    config = None
    with suppress(OSError, ValueError, yaml.YAMLError):  # a run may have been killed while it wrote the file
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    return config if isinstance(config, dict) else {}


def data_of_run(checkpoint: Path, views: bool = False) -> dict[str, Any] | None:
    """The data of the run that wrote a checkpoint, without what only training needs; None if it is not known.

    Args:
        checkpoint: The file.
        views: Whether to keep the training views.
    """
    folder = run_of(checkpoint)
    data = read_config(folder).get("data") if folder is not None and checkpoint.is_file() else None
    if not isinstance(data, dict) or "class_path" not in data:
        return None
    for training_only in ("positives", *(() if views else ("views", "transform"))):
        data.get("init_args", {}).pop(training_only, None)
    return data


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """The starts in ``environment.json``; none if it is missing or damaged.

    Args:
        folder: The run folder.
    """
    starts = None
    with suppress(OSError, ValueError):
        starts = json.loads((folder / ENVIRONMENT_FILE).read_text(encoding="utf-8"))
    return starts if isinstance(starts, list) else []


def timestamp(moment: str) -> float | None:
    """A moment of ``environment.json`` in seconds since 1970; None if it is missing or damaged.

    Args:
        moment: The text, e.g. 2000-01-01T00:00:00+0000.
    """
    with suppress(ValueError):
        return datetime.strptime(moment, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    return None


def unreadable_lists(folder: Path) -> list[Path]:
    """The lists of unreadable images, one file for each process that met any.

    Args:
        folder: The run folder.
    """
    return sorted(folder.glob(_UNREADABLE_FILE.format("*")))


def picture_files(folder: Path) -> dict[str, dict[int, Path]]:
    """The pictures drawn during training: files by name and epoch.

    Args:
        folder: The run folder.
    """
    pictures: dict[str, dict[int, Path]] = {}
    for place in sorted(path for path in (folder / PICTURES_FOLDER).glob("*") if path.is_dir()):
        files = {int(file.stem): file for file in place.glob("*.png") if file.stem.isdigit()}
        pictures[place.name] = {epoch: files[epoch] for epoch in sorted(files)}
    return pictures
