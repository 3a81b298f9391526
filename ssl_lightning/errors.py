"""The error type for what a user can fix, and names in messages."""


class UserError(Exception):
    """Something the user can fix; the message says how.

    The command line prints only the message, without a stack trace.
    """


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
