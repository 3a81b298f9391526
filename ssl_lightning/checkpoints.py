"""Checkpoint files: written aside and renamed, so that an interruption never harms the last good one."""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.plugins.io import TorchCheckpointIO

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
        part = path.with_name(f"{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter on a full disk
            part.unlink(missing_ok=True)
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
def reading(path: str | Path) -> Iterator[None]:
    """Say in words that a checkpoint cannot be read.

    Args:
        path: Its file.

    Raises:
        UserError: It is damaged or no checkpoint.
    """
    try:
        yield
    except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is damaged or no checkpoint: {str(error).partition('. ')[0]}") from error
