"""Files that are dear to find out and cheap to keep: indices of folders and shards."""

import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def cache_folder() -> Path:
    """``$SSL_LIGHTNING_CACHE``, by default ``~/.cache/ssl_lightning``."""
    return Path(os.environ.get("SSL_LIGHTNING_CACHE", "~/.cache/ssl_lightning")).expanduser()


def cache_file(key: str, suffix: str) -> Path:
    """The file that keeps what was found out about ``key``."""
    return cache_folder() / (hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:32] + suffix)


def write_arrays(path: Path, **arrays: NDArray[Any]) -> None:
    """Write arrays as a whole or not at all; a cache that cannot be written is done without."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=path.suffix, delete=False) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        os.replace(file.name, path)
