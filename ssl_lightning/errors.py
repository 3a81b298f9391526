"""The error type for what a user can fix, and names in messages."""

import errno


class UserError(Exception):
    """Something the user can fix; the message says how.

    The command line prints only the message, without a stack trace.
    """


_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


def of_the_machine(error: BaseException) -> UserError | None:
    """What to do about an error of the machine: memory, open files, places that cannot be written; None for any other.

    Args:
        error: The exception.
    """
    text = f"{error} {error.__cause__ or ''}"  # how a worker ended is in the cause
    if "Bus error" in text or "shared memory(shm)" in text or "</torch_" in text:
        return UserError(
            "the processes that load images ran out of shared memory (/dev/shm); raise it, in Docker by --shm-size 8g "
            "or --ipc=host, or set --data.num_workers 0."
        )
    if "DataLoader worker" in text and ("exited unexpectedly" in text or "signal: Killed" in text):
        return UserError(
            "a process that loads images was killed, probably for lack of memory; lower --data.num_workers or "
            "--data.batch_size."
        )
    if "ancdata" in text or (isinstance(error, OSError) and error.errno == errno.EMFILE):
        return UserError("too many files are open; raise the limit (ulimit -n 65536), or lower --data.num_workers.")
    if isinstance(error, OSError) and error.errno in _NOT_WRITABLE and error.filename is not None:
        return UserError(
            f"{error.filename}: {error.strerror}. A run writes below --trainer.default_root_dir, other commands below "
            "--output; name a folder that can be written."
        )
    return None


def listed(names: list[str], most: int = 5) -> str:
    """Names for a message: ``a, b, c and 7 more``.

    Args:
        names: The names.
        most: Number of names to state.
    """
    shown = ", ".join(printable(name) for name in names[:most])
    return f"{shown} and {len(names) - most:,} more" if len(names) > most else shown


def printable(text: str) -> str:
    """A text of any characters on one line, as messages and text files can hold it.

    Args:
        text: Such as the name of a file, which may be no Unicode and may contain line breaks.
    """
    text = text.encode(errors="backslashreplace").decode()
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
