"""How the command line is parsed, and how it reports mistakes."""

import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from ssl_lightning.errors import UserError
from ssl_lightning.mistakes import answer, did_you_mean

_IN_USAGE = 20
"""Number of options up to which the first line of the help names all of them."""


class SSLArgumentParser(LightningArgumentParser):
    """Reports a mistake in a few lines, where jsonargparse would print every option."""

    _outermost: "tuple[SSLArgumentParser, list[str]] | None" = None
    """The parser of the whole command line, and its words: parsers of classes report to it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def format_help(self, *args: Any) -> str:
        """The help, with what people set first at the top, and without a usage line that names a hundred options.

        Args:
            args: Arguments of jsonargparse's.
        """
        if len(self._actions) > _IN_USAGE:
            self.usage = "%(prog)s [--OPTION VALUE ...]"
        first = ("model", "data", "trainer")
        builtin = self._action_groups[:2]

        def place(group: Any) -> int:
            parts = {action.dest.partition(".")[0] for action in group._group_actions}
            return 0 if group in builtin else next((1 + i for i, name in enumerate(first) if name in parts), 9)

        self._action_groups = [*builtin, *sorted(self._action_groups[2:], key=place)]
        return super().format_help(*args)

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Any:
        """Parse, and remember the words for the report of a mistake.

        Args:
            args: The words of the command line; None takes the words that this process was started with.
            rest: As for jsonargparse.
            kwargs: As for jsonargparse.
        """
        before = SSLArgumentParser._outermost
        SSLArgumentParser._outermost = before or (self, [*sys.argv[1:]] if args is None else [*args])
        try:
            return super().parse_args(args, *rest, **kwargs)
        finally:
            SSLArgumentParser._outermost = before

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and what to change, and exit with code 2.

        Args:
            message: The message of jsonargparse.
            ex: The exception that caused it.
        """
        cause: Any = user_error(ex)
        if cause is None and SSLArgumentParser._outermost is not None:
            try:
                cause = answer(*SSLArgumentParser._outermost, message)
            except UserError as error:
                cause = error
        self.exit(2, f"error: {cause or _shortened(message)}\n")


def user_error(error: BaseException | None) -> UserError | None:
    """The UserError inside the exceptions that jsonargparse wrapped around it; None if there is no UserError.

    Args:
        error: The outermost exception.
    """
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def _shortened(message: str) -> str:
    """A message of jsonargparse without its internals."""
    transform = r'Parser key "transform":\s+- (Type \S+ \S+ expects .*?: )?'
    message = re.sub(transform, "--data.transform takes a callable such as my_module.MyTransform. ", message)
    message = re.sub(r'Parser key "([\w.]+)":', r"--\1:", message)
    noise = ("Subtypes: ", "Errors:", "Given value", "Does not validate", "- Expected a <class 'NoneType'>")
    lines = [line for line in message.splitlines() if line.strip() and not line.strip().startswith(noise)]
    if "is not accepted" in message:
        lines.append("fit --help, fit --model.help CLASS and fit --data.help CLASS list the options.")
    return "\n".join(lines)


def with_shipped_configs(words: Sequence[str]) -> list[str]:
    """Find ``--config configs/...`` among the package's recipes if the current folder has no such file.

    Args:
        words: The command line.
    """
    package = Path(__file__).parent
    located = []
    for previous, word in zip(["", *words], words, strict=False):
        option, equals, path = word.partition("=")
        if previous in ("--config", "-c") or (option in ("--config", "-c") and equals):
            prefix, path = (f"{option}=", path) if equals else ("", word)
            shipped = [root / path for root in (package, package.parent) if (root / path).is_file()]
            if not shipped and not os.path.exists(path) and path.endswith((".yaml", ".yml")):
                raise UserError(f"--config {path} does not exist; {_nearest_config(path, package)}")
            word = prefix + (str(shipped[0]) if shipped and not os.path.exists(path) else path)
        located.append(word)
    return located


def _nearest_config(path: str, package: Path) -> str:
    roots = [root for root in (package, package.parent) if (root / "configs").is_dir()]
    shipped = sorted({file.relative_to(root).as_posix() for root in roots for file in root.glob("configs/**/*.yaml")})
    name = path.replace("\\", "/").rpartition("/")[2]
    return (
        did_you_mean(path, shipped) or did_you_mean(name, shipped) or "the package's recipes are configs/METHOD/*.yaml."
    )


def underscored(words: Sequence[str]) -> list[str]:
    """Write options with underscores: ``--data.num-workers=2`` becomes ``--data.num_workers=2``.

    Args:
        words: The command line. Names in dictionaries, such as ``--model.backbone_kwargs.my-name``, stay as they are.
    """
    return [
        re.sub(r"^--(?![\w.]*kwargs\.)[\w.-]+", lambda option: "--" + option[0][2:].replace("-", "_"), word)
        for word in words
    ]


def run_method(kinds: Mapping[str, type], prog: str, description: str, words: Sequence[str]) -> Any:
    """Build an object and call a method of it, as a command line says; returns what the method returns.

    Args:
        kinds: The methods, each a subcommand, and their classes. The arguments of both are options.
        prog: The command.
        description: What it does, for its help.
        words: The command line after the command.
    """
    parser = SSLArgumentParser(prog=prog, description=description)
    methods = parser.add_subcommands()
    for name, kind in kinds.items():
        method = SSLArgumentParser(description=title_of(getattr(kind, name)))
        method.add_argument("--config", action="config", help="YAML file with any of these options.")
        method.add_class_arguments(kind)
        method.add_method_arguments(kind, name)
        methods.add_subcommand(name, method, help=method.description)
    options = parser.parse_args([*words])
    name = options.subcommand
    arguments = vars(parser.instantiate(options)[name])
    arguments.pop("config", None)
    kind = kinds[name]
    parameters = inspect.signature(getattr(kind, name)).parameters.keys() - {"self"}
    chosen = {key: arguments.pop(key) for key in [*arguments] if key in parameters}
    return getattr(kind(**arguments), name)(**chosen)


def title_of(function: Callable[..., Any]) -> str:
    """The first line of a docstring: the title of a help text.

    Args:
        function: Its documented function.
    """
    return (function.__doc__ or "").partition("\n")[0]
