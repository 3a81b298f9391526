"""A walk through a folder that follows links, and sees each real folder and each real file once."""

import os
from collections import deque
from collections.abc import Iterator

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from ssl_lightning.data.formats import is_image


def walk(root: str | os.PathLike[str]) -> Iterator[tuple[str, list[str]]]:
    """All folders below a folder with the names of their files, without hidden folders and files; in no useful order.

    What lies in the folder itself comes before what links lead to, so a link never hides the folder that it points to.
    A link to a folder around the root is a loop, and is not followed.

    Args:
        root: The folder.

    Yields:
        The path of a folder relative to the root, empty for the root itself, and the names of its files.
    """
    real_root = os.path.realpath(root)
    seen_folders: set[str] = set()
    links: list[str] = []  # to files
    # of each folder the path relative to the root, and the real path
    folders, linked_folders = deque([("", real_root)]), deque[tuple[str, str]]()
    while folders or linked_folders:
        folder, real = (folders or linked_folders).popleft()
        if real in seen_folders or (folder and f"{real_root}{os.sep}".startswith(os.path.join(real, ""))):
            continue
        seen_folders.add(real)
        names: list[str] = []
        try:
            entries = [*os.scandir(real)]
        except OSError as error:
            if folder or os.path.exists(root):  # a missing root is reported by its data module
                rank_zero_warn(f"{os.path.join(root, folder)} cannot be read and is left out: {error.strerror}")
            continue
        for entry in entries:
            path = os.path.join(folder, entry.name)
            if entry.name.startswith(".") or entry.name in _NOT_OF_THE_USER:
                continue
            if not entry.is_symlink():
                if entry.is_dir():
                    folders.append((path, entry.path))
                elif entry.is_file():  # no pipe or device, which reading would wait for
                    names.append(entry.name)
            elif os.path.isdir(entry.path):
                linked_folders.append((path, os.path.realpath(entry.path)))
            elif os.path.isfile(entry.path) or not os.path.exists(entry.path):  # a broken link is an unreadable image
                links.append(path)
        yield folder, names
    yield from _linked_files(root, links, seen_folders)


_NOT_OF_THE_USER = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
"""What operating systems and file servers put next to the files, e.g. small copies of the images."""


def _linked_files(
    root: str | os.PathLike[str], links: list[str], seen_folders: set[str]
) -> Iterator[tuple[str, list[str]]]:
    """Links to files, but only the first of several to the same file, and none to an image that the walk has seen."""
    seen: set[str] = set()
    for path in sorted(links):
        target = os.path.realpath(os.path.join(root, path))
        folder, name = os.path.split(target)
        is_listed = folder in seen_folders and is_image(name) and not name.startswith(".") and os.path.exists(target)
        if target not in seen and not is_listed:
            seen.add(target)
            yield os.path.dirname(path), [os.path.basename(path)]
