"""The shape of the package: dependencies point one way, and everything public is documented."""

import ast
import inspect
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import ssl_lightning

PACKAGE = Path(ssl_lightning.__file__).parent
MAY_IMPORT = {
    "methods": {"methods"},
    "data": {"data"},
    "callbacks": {"callbacks", "evaluation"},
    "evaluation": {"evaluation"},
}
COMMANDS = {"__init__", "__main__", "cli", "commands"}
LEAVES = {"backbones", "checkpoints", "losses"} | {path.stem for path in PACKAGE.glob("*.py")} - COMMANDS


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_dependencies_point_one_way(file: Path) -> None:
    place = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if place in COMMANDS:
        return
    allowed = MAY_IMPORT.get(place, set())  # leaves import only leaves
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            assert name.split(".")[0] != "pytorch_lightning", "import it as lightning: the two do not mix"
            if name.startswith("ssl_lightning."):
                part = name.split(".")[1]
                assert part in allowed | LEAVES, f"{file.name} imports {name}"


def test_no_imports_form_a_circle() -> None:
    files = {
        ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): file
        for file in PACKAGE.rglob("*.py")
    }
    imports: dict[str, set[str]] = {module: set() for module in files}
    for module, file in files.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                imports[module].update(name if name in files else node.module for name in names)
    TopologicalSorter(imports).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("name", [name for name in ssl_lightning.__all__ if name != "UserError"])
def test_every_argument_of_a_public_class_is_described(name: str) -> None:
    value = getattr(ssl_lightning, name)
    described = inspect.getdoc(value) or ""
    for parameter in inspect.signature(value).parameters.values():
        if parameter.name not in ("args", "kwargs"):
            assert f"{parameter.name}: " in described, parameter.name
