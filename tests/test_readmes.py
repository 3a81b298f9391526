"""The READMEs: links lead somewhere, commands parse, tables equal ``configs/results.csv``."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.cli import LightningArgumentParser

from ssl_lightning.cli import main
from tests.results_table import READMES, ROOT, rendered, results
from tests.small import slow_unless

PAGES = [ROOT / "README.md", *sorted((ROOT / ".github").glob("*.md"))]
for folder in ("configs", "notebooks", "ssl_lightning", "tests"):
    PAGES += sorted((ROOT / folder).rglob("*.md"))
HERE = re.compile(
    r"https://(github\.com/ssl-lightning/ssl_lightning/(blob|tree)|raw\.githubusercontent\.com/ssl-lightning/ssl_lightning)"
    r"/main/"
)
"""Before the path of a file of this repository: the main README, which PyPI shows too, has no relative links."""


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose_and_code(page: Path) -> tuple[str, list[str]]:
    """The text outside of code blocks, and the lines inside of them, those that continue joined."""
    parts = re.split(r"^```.*\n", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return "".join(parts[::2]), "".join(parts[1::2]).replace("\\\n", "").splitlines()


def anchors(page: Path) -> set[str]:
    """The headings of a page, as GitHub links to them."""
    headings = re.findall(r"^#+ (.*)$", prose_and_code(page)[0], flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_images_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_and_code(page)[0]):
        path, _, anchor = target.partition("#")
        if here := HERE.match(path):
            file = ROOT / path[here.end() :]
        elif "://" in path:
            continue  # asking other sites is not for a test
        else:
            assert page != ROOT / "README.md" or not path, f"{target}: PyPI shows no relative links"
            file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


COMMANDS = {
    (name(page), command)
    for page in PAGES
    for line in prose_and_code(page)[1]
    for command in re.findall(r"-m ssl_lightning (.*)", line)
}


class Parsed(BaseException):
    """The command line was parsed; nothing is to run."""


@pytest.fixture
def _only_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    parse, depth = LightningArgumentParser.parse_args, [0]

    def parse_and_stop(self: Any, *args: Any, **kwargs: Any) -> Any:
        depth[0] += 1
        parsed = parse(self, *args, **kwargs)
        depth[0] -= 1
        if depth[0]:  # of the options of a class
            return parsed
        raise Parsed

    monkeypatch.setattr(LightningArgumentParser, "parse_args", parse_and_stop)


# Not checked: whether the command succeeds, what only the run finds out (files that are missing, extras that are not
# installed, arguments that do not fit together), commands within sentences, and other programs around the command.
@pytest.mark.usefixtures("_only_parse")
@pytest.mark.parametrize(("page", "command"), slow_unless(lambda page, _command: page == "README.md", sorted(COMMANDS)))
def test_every_command_parses(page: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "SimCLR" / "version_0"  # evaluate takes the data of the checkpoint's run
    (run / "checkpoints").mkdir(parents=True)
    for checkpoint in ("last.ckpt", "best.ckpt"):
        (run / "checkpoints" / checkpoint).touch()
    (run / "config.yaml").write_text("data: {class_path: DigitsData}\n")
    placeholders = {
        "DIR": str(tmp_path),
        "PHOTOS": str(tmp_path),
        "RECIPE": "configs/simclr/cifar10_cpu.yaml",
        "CKPT": str(run / "checkpoints" / "last.ckpt"),
        "$method": "byol",
    }
    words = [
        re.sub(r"\b(DIR|PHOTOS|RECIPE|CKPT)\b|\$method\b", lambda match: placeholders[match[0]], word)
        for word in shlex.split(command, comments=True)
    ]
    assert not {"&&", "|", ";"} & set(words), "put it at the end of its line, so that it can be checked"
    monkeypatch.setattr(sys, "argv", ["ssl-lightning", *words])
    with pytest.raises((Parsed, SystemExit)) as end:
        main(words)
    assert end.type is Parsed or end.value.code in (0, None), words  # help and --print_config exit


@pytest.mark.usefixtures("_only_parse")
def test_wrong_commands_do_not_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (["fit", "--model", "SimCLR", "--model.temprature", "1", "--data", "DigitsData"], ["evaluate", "kn"]):
        monkeypatch.setattr(sys, "argv", ["ssl-lightning", *words])
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 2


# Numbers


@pytest.mark.parametrize("page", READMES, ids=name)
def test_tables_equal_the_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert ":begin" in text
    assert rendered(text) == text, "run python -m tests.results_table"


def test_results_are_of_recipes_that_exist() -> None:
    for recipe, row in results().items():
        assert (ROOT / recipe.split()[0]).is_file(), recipe
        assert re.fullmatch(r"[0-9a-f]{7,40}", row["commit"]), recipe
        assert row["load"] in ("quiet", "shared", ""), recipe
        for column in [*row][5:]:
            assert row[column] == "" or float(row[column]) is not None, (recipe, column)


def test_recipes_hold_no_measured_numbers_of_their_own() -> None:
    for recipe in (ROOT / "configs").glob("*/*.yaml"):
        header = " ".join(line[2:] for line in recipe.read_text().splitlines() if line.startswith("# "))
        assert "%" not in header or "reports" in header, recipe  # published numbers are the source of a recipe
