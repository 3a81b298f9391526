"""What the command line answers to a mistake: the option as it is typed, the nearest valid name, an example."""

import dataclasses
import difflib
import functools
import inspect
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger

from ssl_lightning.data.base import SSLDataModule
from ssl_lightning.data.dense import DenseData
from ssl_lightning.errors import UserError
from ssl_lightning.methods.base import SSLModule

_EXAMPLES = """For example:
  python -m ssl_lightning fit --model SimCLR --data ImageFolderData --data.root PHOTOS
  python -m ssl_lightning fit --config configs/quickstart.yaml"""

_CLASSES = {
    "model": SSLModule,
    "data": SSLDataModule,
    "segmentation_probe.data": DenseData,
    "trainer.callbacks": Callback,
    "trainer.logger": Logger,
}
"""Options whose values are classes with options of their own."""

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list, [A, B]",
    "dict": "names with values, {A: 1, B: 2}",
}


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """``did you mean <name>? `` with the most similar name; empty if none is similar.

    Args:
        name: What the user typed.
        names: All valid names.
    """
    by_letters = {valid.lower(): valid for valid in names}
    near = difflib.get_close_matches(name.lower(), by_letters, n=1)
    return f"did you mean {by_letters[near[0]]}? " if near else ""


_USUAL_NAMES = {
    "epochs": "max_epochs",
    "gpus": "devices",
    "learning_rate": "base_lr",
    "lr": "base_lr",
    "wd": "weight_decay",
    "workers": "num_workers",
}
"""What other programs call some options, which no spelling resembles."""


def nearest_option(name: str, names: Iterable[str]) -> str | None:
    """The valid option that a misspelt option stands for; None if none is similar.

    Args:
        name: Such as ``modle.temperatur``.
        names: All valid options.
    """
    names = sorted(names)
    above, _, last = name.rpartition(".")
    if (usual := _USUAL_NAMES.get(last)) and (same := [option for option in names if option.endswith(f".{usual}")]):
        return max(same, key=lambda option: difflib.SequenceMatcher(None, f"{above}.{usual}", option).ratio())
    if near := difflib.get_close_matches(name, names, n=1, cutoff=0.75):
        return near[0]
    ends = {option.rpartition(".")[2] for option in names}
    if same := difflib.get_close_matches(last, ends, n=1, cutoff=0.75):
        among = [option for option in names if option.rpartition(".")[2] == same[0]]
        return max(among, key=lambda option: difflib.SequenceMatcher(None, name, option).ratio())
    return next(iter(difflib.get_close_matches(name, names, n=1)), None)


@dataclasses.dataclass(frozen=True)
class Typed:
    """An option that the user gave.

    Args:
        name: Dotted, without ``init_args``.
        value: As it was typed.
        file: The file it stands in; None for the command line.
    """

    name: str
    value: Any
    file: str | None = None

    def __str__(self) -> str:
        return f"--{self.name}" if self.file is None else f"{self.name} in {self.file}"


def answer(parser: Any, words: list[str], message: str) -> str | None:
    """What to tell the user; None if the mistake is of another kind.

    Args:
        parser: The parser of the whole command line.
        words: The command line.
        message: jsonargparse's message.
    """
    while (commands := getattr(parser, "_subcommands_action", None)) is not None:
        if not words or words[0] not in commands._name_parser_map:
            known = [*commands._name_parser_map, *getattr(parser, "further_commands", ())]
            given = words[0] if words and not words[0].startswith("-") else ""
            reason = f"{given}: no such command; {did_you_mean(given, known)}" if given else "a command is missing; "
            return f"{reason}choose from {', '.join(known)}."
        parser, words = commands._name_parser_map[words[0]], words[1:]
    typed = [*typed_options(words)]
    names = {action.dest for action in parser._actions if action.option_strings}
    # parts of Lightning's that have options of their own
    is_open = {action.dest for action in parser._actions if _is_open(action)} - _CLASSES.keys()
    needed: set[str] = set()
    chosen = chosen_classes(typed)
    for base in {"model", "data"} - chosen.keys():  # not chosen, or misspelt: what every such class has
        names |= {f"{base}.{name}" for kind in _below(_CLASSES[base]) for name in inspect.signature(kind).parameters}
    for key, classes in chosen.items():
        for kind in classes:
            below, required, free = _options_of(kind)
            names |= {f"{key}.{name}" for name in below}
            needed |= {f"{key}.{name}" for name in required}
            is_open |= {f"{key}.{name}" for name in free}
    for option in typed:
        above = option.name.split(".")
        parents = {".".join(above[:depth]) for depth in range(1, len(above) + 1)}
        group = any(name.startswith(f"{option.name}.") for name in names)
        if option.name not in names and not parents & is_open and not group:
            near = nearest_option(option.name, names)
            hint = f"did you mean {'--' if option.file is None else ''}{near}?" if near else "--help lists the options."
            return f"{option}: no such option; {hint}"
    return _missing(typed, needed, message) or _wrong_value(typed, message) or _not_given(parser, message)


def _missing(typed: list[Typed], needed: set[str], message: str) -> str | None:
    if required := re.search(r"arguments are required: (.+)", message):
        last = [name.rpartition(".")[2] for name in required[1].split(", ")]
        given = {option.name for option in typed}
        what = {"model": "--model, the method", "data": "--data, the images"}
        if missing := [text for name, text in what.items() if name in last and name not in given]:
            return f"missing: {' and '.join(missing)}.\n{_EXAMPLES}"
        if missing := sorted(name for name in needed - given if name.rpartition(".")[2] in last):
            value = "PHOTOS" if missing[0] == "data.root" else "VALUE"
            return f"missing: {', '.join(f'--{name}' for name in missing)}. For example: --{missing[0]} {value}"
    return None


def _not_given(parser: Any, message: str) -> str | None:
    """Names what has no value as it is typed: options with dashes."""
    if without := re.search(r"argument (?:-\w/)?(--\S+): expected one argument", message):
        return f"{without[1]}: a value is missing."
    if stray := re.search(r"unrecognized arguments: ([^-\s]\S*)", message):
        kinds = {kind.__name__: key for key in ("model", "data") for kind in _below(_CLASSES[key])}
        key = kinds.get(stray[1])
        hint = f"did you mean --{key} {stray[1]}?" if key else "no such option; options begin with --."
        return f"{stray[1]}: {hint}"
    if required := re.search(r"arguments are required: (.+)", message):
        options = {action.dest for action in parser._actions if action.option_strings}
        names = [name.rpartition(".")[2] if name not in options else name for name in required[1].split(", ")]
        return f"missing: {', '.join(f'--{name}' if name in options else name for name in names)}."
    return None


def _wrong_value(typed: list[Typed], message: str) -> str | None:
    key = re.search(r'Parser key "([\w.]+)"', message)
    kinds = re.findall(r"Expected an? (<class '[\w.]+'>|typing\.Literal\[.*?\])", message)
    option = next((one for one in reversed(typed) if key and f".{key[1]}." in f".{one.name}."), None)
    if key is None or option is None or not kinds or option.name in _CLASSES:
        return None
    if not option.name.endswith(key[1]):  # the value begins like a dictionary: {a:1} without a space
        option = Typed(f".{option.name}".partition(f".{key[1]}.")[0][1:] + f".{key[1]}", "", option.file)
    texts = []
    for kind in kinds:
        name = kind.rpartition(".")[2].strip("<>'").removeprefix("class '")
        texts.append(_KINDS.get(name, name))
        if kind.startswith("typing"):
            texts[-1] = kind.partition("[")[2].strip("]").replace("'", "")
    texts = [text for text in dict.fromkeys(texts) if text != "NoneType"]
    given = f"{option} {option.value}".rstrip()
    expected = " or ".join(texts) or "null, or its own options, which --help lists"
    return f"{given}: expected {expected}."


def typed_options(words: list[str]) -> Iterator[Typed]:
    """The options of a command line and of the files that it names, in order.

    Args:
        words: The command line after the command.
    """
    for index, word in enumerate(words):
        name, equals, value = word.removeprefix("--").partition("=")
        if word == "-c" or (word.startswith("--") and name):
            value = value if equals else next(iter(words[index + 1 : index + 2]), "")
            name = (
                "config"
                if word == "-c"
                else name.removesuffix("+").replace(".init_args", "").removesuffix(".class_path")
            )
            if name == "config":
                yield from _in_file(value)
            elif value.startswith(("{", "[")):
                yield from _in_text(value, name, None)
            else:
                yield Typed(name, value)


def _in_file(path: str) -> Iterator[Typed]:
    with suppress(OSError, ValueError):  # jsonargparse says what is wrong with a file
        yield from _in_text(Path(path).read_text(), "", path)


def _in_text(text: str, name: str, file: str | None) -> Iterator[Typed]:
    with suppress(yaml.YAMLError):
        yield from _flat(yaml.safe_load(text), name, file)


def _flat(node: Any, name: str, file: str | None) -> Iterator[Typed]:
    if isinstance(node, list):
        for part in node:
            yield from _flat(part, name, file) if isinstance(part, dict) else [Typed(name, part, file)]
    elif isinstance(node, dict) and node:
        if "class_path" in node:
            yield Typed(name, node["class_path"], file)
        for key, value in node.items():
            if key == "init_args":
                yield from _flat(value, name, file)
            elif key not in ("class_path", "dict_kwargs"):
                yield from _flat(value, f"{name}.{key}" if name else str(key), file)
    elif name:
        yield Typed(name, node, file)


def chosen_classes(typed: list[Typed]) -> dict[str, list[type]]:
    """The classes that the user chose, by option.

    Args:
        typed: The options that were given.

    Raises:
        UserError: There is no such class.
    """
    chosen: dict[str, list[type]] = {}
    for option in typed:
        if option.name == "data" and isinstance(option.value, str) and re.search(r"[/\\~]", option.value):
            raise UserError(
                f"{option} {option.value}: no such class; a folder of images is --data ImageFolderData --data.root "
                f"{option.value}."
            )
        if option.name in _CLASSES and isinstance(option.value, str) and option.value.isidentifier():
            kinds = [*_below(_CLASSES[option.name]), *(_below(DenseData) if option.name == "data" else [])]
            below = {kind.__name__: kind for kind in kinds if not kind.__name__.startswith("_")}
            if option.value not in below:
                if option.value in ("true", "false", "null", "True", "False"):  # of trainer.logger
                    continue
                hint = did_you_mean(option.value, below)
                below = {name: kind for name, kind in below.items() if not issubclass(kind, DenseData)}
                names = f"Choose from {', '.join(sorted(below))}, or give my_module.MyClass."
                raise UserError(f"{option} {option.value}: no such class; {hint}{names}")
            kind = below[option.value]
        elif option.name in _CLASSES and isinstance(option.value, str) and "." in option.value:
            module, _, name = option.value.rpartition(".")
            try:
                kind = getattr(import_module(module), name)
            except (ImportError, AttributeError) as error:
                raise UserError(f"{option} {option.value}: {error}.") from error
            except (TypeError, ValueError):  # a path or a value of another kind
                continue
        else:
            continue
        several = option.name.startswith("trainer.")
        chosen[option.name] = [*chosen.get(option.name, []), kind] if several else [kind]
    return chosen


def _below(base: type[Any]) -> Iterator[type[Any]]:
    """The classes below one that a user may choose."""
    for kind in base.__subclasses__():
        if not inspect.isabstract(kind):
            yield kind
        yield from _below(kind)


@functools.cache
def _options_of(kind: type) -> tuple[set[str], set[str], set[str]]:
    """Names of a class's options, of those that are required, and of those below which any name is valid."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "of", fail_untyped=False)
    names: set[str] = set()
    is_open: set[str] = set()
    for action in parser._actions:
        if not action.dest.startswith("of."):
            continue
        name, hint = action.dest[3:], getattr(action, "_typehint", None)
        names.add(name)
        if fields := [*_fields(hint)]:
            names |= {f"{name}.{field}" for field in fields}
        elif _is_open(action):
            is_open.add(name)
    required = {action.dest[3:] for action in parser._actions if _is_required(parser, action)}
    return names, required, is_open


def _is_open(action: Any) -> bool:
    """Whether an option may have any options below it: a dictionary, or a class with its arguments."""
    return re.search(r"dict|Any|Module|Callable|lightning", str(getattr(action, "_typehint", None))) is not None


def _is_required(parser: Any, action: Any) -> bool:
    return bool(action.required) or action.dest in getattr(parser, "required_args", ())  # of older jsonargparse


def _fields(hint: Any) -> Iterator[str]:
    """Names of the fields of the dataclasses in a type, such as lora and lora.rank."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        types = get_type_hints(hint)
        for field in dataclasses.fields(hint):
            yield field.name
            yield from (f"{field.name}.{name}" for name in _fields(types[field.name]))
    for part in get_args(hint):
        yield from _fields(part)


def dropped_options(words: list[str], model: Any, data: Any) -> list[str]:
    """A sentence for each class of a config file that another class took the place of: what was dropped.

    Args:
        words: The command line.
        model: What was parsed for ``--model``.
        data: What was parsed for ``--data``.
    """
    sentences, typed = [], [*typed_options(words)]
    for key, final in (("model", model), ("data", data)):
        name, left = final.class_path.rpartition(".")[2], vars(final.get("init_args") or object)
        for given in [option for option in typed if option.name == key and option.file is not None]:
            if str(given.value).rpartition(".")[2] != name:
                options = [one.name for one in typed if one.file == given.file and one.name.startswith(f"{key}.")]
                lost = dict.fromkeys(option for option in options if option.split(".")[1] not in left)
                dropped = f"; dropped, because it has none: {', '.join(lost)}" if lost else ""
                sentences.append(f"--{key} {name} takes the place of {given.value} in {given.file}{dropped}")
    return sentences
