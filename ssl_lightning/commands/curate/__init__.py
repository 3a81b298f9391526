"""The command ``curate``: near-duplicates, outliers, and subsets of images by their features."""

import inspect
from collections.abc import Sequence

from ssl_lightning.arguments import SSLArgumentParser, title_of
from ssl_lightning.commands.curate.choose import Curation

__all__ = ["Curation", "run"]

_WAYS = ("duplicates", "outliers", "select")


def run(words: Sequence[str]) -> None:
    """Run the command.

    Args:
        words: The command line after ``curate``.
    """
    parser = SSLArgumentParser(prog="ssl-lightning curate", description="Choose images by their features.")
    ways = parser.add_subcommands()
    for name in _WAYS:
        way = SSLArgumentParser(description=title_of(getattr(Curation, name)))
        way.add_argument("--config", action="config", help="YAML file with any of these options.")
        way.add_class_arguments(Curation)
        way.add_method_arguments(Curation, name)
        ways.add_subcommand(name, way, help=way.description)
    options = parser.parse_args(list(words))
    arguments = vars(parser.instantiate(options)[options.subcommand])
    arguments.pop("config", None)
    parameters = inspect.signature(getattr(Curation, options.subcommand)).parameters.keys() - {"self"}
    chosen = {key: arguments.pop(key) for key in [*arguments] if key in parameters}
    report = getattr(Curation(**arguments), options.subcommand)(**chosen)
    if report is not None:  # on the first process
        print(report)
