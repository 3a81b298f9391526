"""Checkpoint files: written so that an interruption never harms the last good one."""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import lightning as L
import torch
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from packaging.version import Version
from safetensors import SafetensorError

from ssl_lightning.errors import UserError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's plugin that writes checkpoints, for files that are whole at every moment.

    Lightning's own collects a checkpoint in memory and moves it from the temporary folder, which is no renaming but
    copying where that is another disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write beside the file, then rename.

        Args:
            checkpoint: What to save.
            path: File, or the URL of one, which Lightning's own way is left to.
            storage_options: As for Lightning's.

        Raises:
            UserError: The disk is full or cannot be written; an earlier file of that name is as it was.
        """
        if not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        try:
            with replacing(path) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter on a full disk
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            kept = "the earlier one is kept" if path.exists() else "there is no earlier one"
            raise UserError(
                f"cannot write the checkpoint {path} ({cause}); {kept}. Free space or set trainer.default_root_dir, "
                f"then go on with --ckpt_path last."
            ) from error

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint.

        Args:
            path: File or URL.
            args: As for Lightning's.
            kwargs: As for Lightning's.

        Raises:
            UserError: The file is damaged or no checkpoint.
        """
        with reading(path):
            return super().load_checkpoint(path, *args, **kwargs)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes the place of another once it is whole; a failure leaves that other one as it was.

    Args:
        path: The place; its folder is made.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Say in words that a checkpoint cannot be read.

    Args:
        path: Its file.

    Raises:
        UserError: It is damaged or no checkpoint.
    """
    try:
        yield
    except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(f"{path} is damaged or no checkpoint: {str(error).partition('. ')[0]}") from error


def rename(state: dict[str, Any], renamed: dict[str, str]) -> None:
    """Give parts of a state that an earlier version saved their present names, in place and in order.

    Args:
        state: Weights by name.
        renamed: Old prefixes and what takes their place.
    """
    for key in list(state):
        old = next((old for old in renamed if f"{key}.".startswith(f"{old}.")), None)
        state[key if old is None else renamed[old] + key.removeprefix(old)] = state.pop(key)


def describe(method: Any, checkpoint: dict[str, Any]) -> None:
    """Add what a reader of a checkpoint needs to know about its weights: method, branch, data, metrics.

    Args:
        method: The method that is saved.
        checkpoint: What is about to be written.
    """
    bases = [base.__name__ for base in type(method).__mro__ if issubclass(base, L.LightningModule)]
    checkpoint["method"], checkpoint["method_bases"] = bases[0], bases[: bases.index("SSLModule") + 1]
    checkpoint["ssl_lightning_version"] = version("ssl_lightning")
    evaluated = method.evaluated_backbone
    checkpoint["evaluated_backbone"] = next(name for name, part in method.named_modules() if part is evaluated)
    if method._trainer is None:
        return
    checkpoint["metrics"] = {name: float(value) for name, value in method.trainer.callback_metrics.items()}
    data: Any = getattr(method.trainer, "datamodule", None)
    if hasattr(data, "image_transform"):
        checkpoint["image_transform"], checkpoint["facts"] = data.image_transform, data.facts


def settle_progress(saved: dict[str, Any], fit_loop: Any) -> None:
    """Count the batch at hand as done, and a validation that is due or under way as one to begin anew.

    Callbacks save before Lightning counts the batch. It takes such a run up again, but one saved at the last batch of
    an epoch loses count of its epochs (seen in 2.6), and one saved during a validation leaves batches out.

    Args:
        saved: State of the trainer's fit loop in a checkpoint that is being written.
        fit_loop: The loop.
    """
    batches, validation = saved["epoch_loop.batch_progress"], saved["epoch_loop.val_loop.batch_progress"]
    begins = validation["current"]["completed"] < validation["current"]["ready"]
    if batches["current"]["completed"] < batches["current"]["processed"]:
        _count(batches, "completed")
        loop, fetcher = fit_loop.epoch_loop, fit_loop._data_fetcher
        begins = fetcher is not None and loop._should_check_val_fx(fetcher)
        if not begins:  # else all that follows is still to come
            saved["epoch_loop.state_dict"]["_batches_that_stepped"] += not loop._should_accumulate()
            if loop._num_ready_batches_reached():
                _count(saved["epoch_progress"], "processed")
    if begins:
        for count in (validation["total"], validation["current"]):
            count |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}


def _count(progress: dict[str, dict[str, int]], what: str) -> None:
    for part in ("total", "current"):
        progress[part][what] += 1


def check_fit(module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Check whether the weights in a checkpoint are those of such a module; warn where a training goes on otherwise.

    Args:
        module: The method, with a trainer.
        checkpoint: What is about to be loaded.

    Raises:
        UserError: They are not; says what differs.
    """
    own, saved = _flat(module.hparams), _flat(checkpoint.get("hyper_parameters", {}))
    own.pop("init_from", None)  # has had its effect
    changed = [f"{key} {own[key]} (was {saved[key]})" for key in own if key in saved and own[key] != saved[key]]
    weights, found = module.state_dict(), checkpoint.get("state_dict", {})
    unlike = {name for name in weights.keys() & found.keys() if _shape(weights[name]) != _shape(found[name])}
    if module.strict_loading:
        unlike |= weights.keys() ^ found.keys()
    if unlike:
        name, method = type(module).__name__, checkpoint.get("method", "another method")
        newer = str(checkpoint.get("ssl_lightning_version", "0"))
        differing = [f"the method {name} (was {method})"] if method != name else []
        if Version(newer) > Version(version("ssl_lightning")):
            differing.append(f"the version of this package {version('ssl_lightning')} (was {newer})")
        raise UserError(
            f"the checkpoint does not fit: {len(unlike)} weights are missing, of another shape or too many, e.g. "
            f"{', '.join(sorted(unlike)[:3])}. What differs: "
            f"{'; '.join(differing + changed) or 'the code of the method'}."
        )
    if changed and module.trainer.state.fn == TrainerFn.FITTING:
        rank_zero_warn(f"going on with other hyper-parameters than the checkpoint's: {'; '.join(changed)}")


def _flat(hyper_parameters: Any, prefix: str = "") -> dict[str, str]:
    """Hyper-parameters as text, those in dictionaries as ``outer.inner``; a tuple is the list that YAML makes of it."""
    flat: dict[str, str] = {}
    for key, value in hyper_parameters.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(list(value) if isinstance(value, tuple) else value)
    return flat


def _shape(value: Any) -> Any:
    return getattr(value, "shape", None)
