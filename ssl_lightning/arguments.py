"""How the command line is parsed, and how it reports mistakes."""

import difflib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from ssl_lightning.data.base import SSLDataModule
from ssl_lightning.errors import UserError
from ssl_lightning.methods.base import SSLModule


class SSLArgumentParser(LightningArgumentParser):
    """Reports a mistake in a few lines, where jsonargparse would print every option."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and what to change, and exit with code 2.

        Args:
            message: The message of jsonargparse.
            ex: The exception that caused it.
        """
        self.exit(2, f"error: {user_error(ex) or _shortened(message)}\n")


def user_error(error: BaseException | None) -> UserError | None:
    """The UserError inside the exceptions that jsonargparse wrapped around it; None if there is no UserError.

    Args:
        error: The outermost exception.
    """
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """``did you mean <name>? `` with the most similar name; empty if none is similar.

    Args:
        name: What the user typed.
        names: All valid names.
    """
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]}? " if near else ""


def _shortened(message: str) -> str:
    """A message of jsonargparse without its internals, with the names to choose from."""
    if unknown := re.search(r'key "(model|data)"(?:.|\n)*Expected a dot import path string: (\S+)', message):
        key, name = unknown.groups()
        names = sorted(_public_subclasses(SSLModule if key == "model" else SSLDataModule))
        hint = did_you_mean(name, names)
        return f"--{key} {name}: no such class; {hint}Choose from {', '.join(names)}, or give my_module.MyClass."
    transform = r'Parser key "transform":\s+- (Type \S+ \S+ expects .*?: )?'
    message = re.sub(transform, "--data.transform takes a callable such as my_module.MyTransform. ", message)
    noise = ("Subtypes: ", "Errors:", "Given value", "Does not validate", "- Expected a <class 'NoneType'>")
    lines = [line for line in message.splitlines() if line.strip() and not line.strip().startswith(noise)]
    if "is not accepted" in message:
        lines.append("fit --help, fit --model.help CLASS and fit --data.help CLASS list the options.")
    return "\n".join(lines)


def _public_subclasses(base: type) -> set[str]:
    """Names of the public subclasses imported so far."""
    names = {base.__name__} if not base.__name__.startswith("_") and base not in (SSLModule, SSLDataModule) else set()
    return names.union(*map(_public_subclasses, base.__subclasses__()))


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
            word = prefix + (str(shipped[0]) if shipped and not os.path.exists(path) else path)
        located.append(word)
    return located


def underscored(words: Sequence[str]) -> list[str]:
    """Write options with underscores: ``--image-size=32`` becomes ``--image_size=32``.

    Args:
        words: The command line.
    """
    split = [word.partition("=") for word in words]
    return [
        f"--{option[2:].replace('-', '_')}{equals}{value}" if option.startswith("--") else option + equals + value
        for option, equals, value in split
    ]


def title_of(function: Callable[..., Any]) -> str:
    """The first line of a docstring: the title of a help text.

    Args:
        function: Its documented function.
    """
    return (function.__doc__ or "").partition("\n")[0]
