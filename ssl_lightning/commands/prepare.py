"""The command ``prepare``: a smaller copy of a folder of large images, for faster training."""

import sys
from collections.abc import Sequence

from ssl_lightning.arguments import SSLArgumentParser, title_of
from ssl_lightning.data.smaller_copy import prepare


def run(words: Sequence[str]) -> None:
    """Run the command.

    Args:
        words: The command line after ``prepare``.
    """
    parser = SSLArgumentParser(prog="ssl-lightning prepare", description=title_of(prepare))
    parser.add_function_arguments(prepare, as_positional=False)
    try:
        print(prepare(**parser.parse_args(words)))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
