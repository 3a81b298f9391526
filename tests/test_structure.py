"""The shape of the package: dependencies point one way, files are short, and everything public is documented."""

import ast
import inspect
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import ssl_lightning

PACKAGE = Path(ssl_lightning.__file__).parent
FILES = {  # by the names that imports use
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
MAY_IMPORT = {
    "methods": {"methods"},
    "data": {"data"},
    "callbacks": {"callbacks", "evaluation"},
    "evaluation": {"evaluation"},
}
COMMAND_LINE = {"__init__", "__main__", "arguments", "cli", "commands", "mistakes"}
LEAVES = {"backbones", "checkpoints", "losses"} | {path.stem for path in PACKAGE.glob("*.py")} - COMMAND_LINE
MAX_LINES = 400

every_file = pytest.mark.parametrize("name", FILES)


def imported(name: str, for_types: bool = True) -> set[str]:
    """Modules that a file imports, also inside functions; those only for type checkers can be left out."""
    modules: set[str] = set()
    left: list[ast.AST] = [ast.parse(FILES[name].read_text())]
    while left:
        node = left.pop()
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            full_names = [f"{node.module}.{alias.name}" for alias in node.names]
            modules |= {full if full in FILES else str(node.module) for full in full_names}
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not for_types:
            left += node.orelse
        else:
            left += ast.iter_child_nodes(node)
    return modules


def room(module: str) -> str:
    """The folder or file of the package's top level that a module belongs to."""
    return module.split(".")[1] if "." in module else "__init__"


@every_file
def test_dependencies_point_one_way(name: str) -> None:
    modules = imported(name)
    assert "pytorch_lightning" not in {module.split(".")[0] for module in modules}, "lightning does not mix with it"
    own = modules & FILES.keys()
    if room(name) not in ("__init__", "cli", "commands"):
        assert "commands" not in map(room, own)
    if room(name) != "__main__":
        assert "cli" not in map(room, own)
    if room(name) not in COMMAND_LINE:
        allowed = LEAVES | MAY_IMPORT.get(room(name), set())  # leaves import only leaves
        assert not [module for module in own if room(module) not in allowed]
    if name == "ssl_lightning.runs":
        assert own <= {"ssl_lightning.errors"}


def test_imports_make_no_circle() -> None:
    try:
        TopologicalSorter({name: imported(name, for_types=False) & FILES.keys() for name in FILES}).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@every_file
def test_files_are_short(name: str) -> None:
    assert len(FILES[name].read_text().splitlines()) <= MAX_LINES, "a longer file is two files"


@pytest.mark.parametrize("name", [name for name in ssl_lightning.__all__ if name != "UserError"])
def test_every_argument_of_a_public_class_is_described(name: str) -> None:
    value = getattr(ssl_lightning, name)
    described = inspect.getdoc(value) or ""
    for parameter in inspect.signature(value).parameters.values():
        if parameter.name not in ("args", "kwargs"):
            assert f"{parameter.name}: " in described, parameter.name
