"""The command ``export``: the backbone of a checkpoint in a format of other programs."""

from collections.abc import Sequence
from pathlib import Path

from ssl_lightning.arguments import SSLArgumentParser, title_of
from ssl_lightning.checkpoints import export


def run(words: Sequence[str]) -> None:
    """Run the command.

    Args:
        words: The command line after ``export``.
    """
    parser = SSLArgumentParser(prog="ssl-lightning export", description=title_of(export))
    parser.add_function_arguments(export, as_positional=False)
    output = export(**parser.parse_args(words))
    card = output / "README.md" if isinstance(output, Path) and output.is_dir() else None
    print(output if isinstance(output, str) else f"{output}\n{card or output.with_suffix('.md')}")
