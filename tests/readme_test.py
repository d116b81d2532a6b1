"""The README says what is so: its commands, its Python, its rooms."""

import json
import pathlib
import re
import sys

import pytest
from command_line import refused

from astraea_jax import cli
from astraea_jax.bench import tables

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def section(title):
    """The text under a heading."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.M | re.S)
    assert found, f"the README has no section {title!r}"
    return found.group(1)


def blocks(text):
    """The fenced blocks of a text."""
    return re.findall(r"```\w*\n(.*?)```", text, re.S)


def test_start_holds_exactly_two_commands_of_one_line():
    commands = blocks(section("Start"))
    assert [command.count("\n") for command in commands] == [1, 1]
    assert all(command.startswith("pip install uv && uv run ") for command in commands)
    assert "astraea generate" in commands[0] and "pytest" in commands[1]


def test_the_notebook_runs_the_readmes_python():
    (code,) = blocks(section("Fifteen lines of Python"))
    lines = [line for line in code.splitlines() if line]
    assert 10 <= len(lines) <= 15
    notebook = json.loads((ROOT / "notebooks" / "01_first_video.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code.rstrip() in cells
    assert "assert " in cells[-1] and "except ImportError" in cells[0]


def test_the_rooms_are_there():
    tree = section("Rooms")
    for folder, names in re.findall(r"^    (\S+)/ +(?:.*)\n((?:^      .*\n)*)", tree, re.M):
        assert (ROOT / folder).is_dir()
        for line in names.splitlines():
            for name in re.match(r"      ((?:\S+  ?)+)", line).group(1).split():
                if name.endswith((".py", "/")):
                    assert (ROOT / folder / name).exists(), name


def test_pictures_are_there():
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("name", tables.TABLES)
def test_the_tables_are_those_of_the_results(name):
    (found,) = re.findall(tables.MARKED.format(name), README, re.S)
    assert found[1].strip() == tables.made(name)
    assert len(found[1].splitlines()) > 6


def test_tables_go_where_they_are_marked(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(README.replace("| Euler | 30 % |", "| Euler | 31 % |"))
    assert cli.main(["bench", "tables", "--readme", str(readme)]) == 0
    assert readme.read_text() == README
    assert cli.main(["bench", "tables"]) == 0
    assert tables.made("search") in capsys.readouterr().out
    readme.write_text("nothing is marked here")
    line = refused(capsys, "bench", "tables", "--readme", str(readme))
    assert "table: search" in line and readme.read_text() == "nothing is marked here"


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"\b[A-Z]+_TABLE\b|TODO|FIXME", README)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
