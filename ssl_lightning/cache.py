"""An on-disk cache for what takes long to compute: indices of folders and shards, and features."""

import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def cache_folder() -> Path:
    """``$SSL_LIGHTNING_CACHE``, by default ``~/.cache/ssl_lightning``; without a home, a temporary folder."""
    try:
        return Path(os.environ.get("SSL_LIGHTNING_CACHE", "~/.cache/ssl_lightning")).expanduser()
    except RuntimeError:  # HOME is not set, and the user of a container need not be in /etc/passwd
        return Path(tempfile.gettempdir(), "ssl_lightning")


def cache_file(key: str, suffix: str) -> Path:
    """The cache file for a key.

    Args:
        key: Identifies the content.
        suffix: Ending of the file's name.
    """
    return cache_folder() / (hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:32] + suffix)


def write_arrays(path: Path, **arrays: NDArray[Any]) -> None:
    """Write arrays to a file, all or none. If the cache cannot be written, nothing happens.

    Args:
        path: The ``.npz`` file.
        arrays: The arrays by their names.
    """
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=path.suffix, delete=False) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # mypy takes one for allow_pickle
        os.replace(file.name, path)
