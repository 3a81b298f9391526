"""The command ``curate``: near-duplicates, outliers, and subsets of images by their features."""

from collections.abc import Sequence

from ssl_lightning.arguments import run_method
from ssl_lightning.commands.curate.choose import Curation

__all__ = ["Curation", "run"]

_WAYS = ("duplicates", "outliers", "select")


def run(words: Sequence[str]) -> None:
    """Run the command.

    Args:
        words: The command line after ``curate``.
    """
    report = run_method(
        dict.fromkeys(_WAYS, Curation), "ssl-lightning curate", "Choose images by their features.", words
    )
    if report is not None:  # on the first process
        print(report)
