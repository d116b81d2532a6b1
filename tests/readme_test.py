"""The README says what is so: its commands, its Python, its rooms."""

import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import pytest
import studies
from helpers import small_inputs, small_model

from astraea_jax.checks import Refusal
from astraea_jax.denoise import denoise
from astraea_jax.methods import Astraea
from astraea_jax.solvers import unipc

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
STUDIES = (studies.FOLDER / "README.md").read_text()
tables = studies.study("tables")


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
    code, _ = blocks(section("Python"))
    lines = [line for line in code.splitlines() if line]
    assert 10 <= len(lines) <= 15
    notebook = json.loads((ROOT / "notebooks" / "01_first_video.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code.rstrip() in cells
    assert "assert " in cells[-1] and "except ImportError" in cells[0]


def test_the_loop_may_be_called_from_jitted_code():
    _, code = blocks(section("Python"))
    names = {"jax": jax, "denoise": denoise, "unipc": unipc, "Astraea": Astraea}
    exec(code, names)
    latents, context = small_inputs()
    levels = jnp.asarray([10] + [5] * 29, jnp.int8)
    shape = jax.eval_shape(names["sample"], small_model(), latents, context[:1], levels)
    assert shape.shape == latents.shape


def test_the_rooms_are_there():
    tree = section("Layout")
    for folder, names in re.findall(r"^    (\S+)/ +(?:.*)\n((?:^      .*\n)*)", tree, re.M):
        assert (ROOT / folder).is_dir()
        for line in names.splitlines():
            for name in re.match(r"      ((?:\S+  ?)+)", line).group(1).split():
                if name.endswith((".py", "/")):
                    assert (ROOT / folder / name).exists(), name


def test_pictures_are_there():
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file(), path


def test_links_lead_somewhere():
    for path in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / path).is_file(), path
    for heading in re.findall(r"\]\(#([^)]+)\)", README):
        assert re.search(rf"^## {heading.replace('-', ' ')}$", README, re.M | re.I), heading


def test_it_is_read_in_a_few_minutes():
    assert len(README.splitlines()) <= 200


def test_links_to_the_studies_lead_to_a_section():
    headings = re.findall(r"^#+ (.*)$", STUDIES, re.M)
    sections = {heading.lower().replace(" ", "-").replace(".", "") for heading in headings}
    for section in re.findall(r"\(notebooks/studies/README\.md#([^)]+)\)", README):
        assert section in sections


@pytest.mark.parametrize("name", tables.TABLES)
def test_the_tables_are_those_of_the_results(name):
    places = re.findall(tables.MARKED.format(name), STUDIES + README, re.S)
    assert places
    for _, table, _ in places:
        assert table.strip() == tables.made(name)


def test_tables_go_where_they_are_marked(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(STUDIES.replace("| Euler | 30 % |", "| Euler | 31 % |"))
    tables.command(readme=readme)
    assert readme.read_text() == STUDIES
    tables.command()
    assert tables.made("search") in capsys.readouterr().out
    for text, words in (
        ("nothing is marked here", "NAME of search, .*; got none"),
        ("<!-- table: moon -->\n<!-- end -->", "got moon"),
        ("<!-- table: wan -->\n", "expected `<!-- end -->` after"),
    ):
        readme.write_text(text)
        with pytest.raises(Refusal, match=words):
            tables.command(readme=readme)
        assert readme.read_text() == text


def test_every_result_is_of_a_table_and_every_study_has_its_line():
    results = {path.name for path in studies.FOLDER.glob("*.json")}
    assert results == {file for file, _ in tables.TABLES.values()}
    for path in [*studies.FOLDER.glob("*.json"), studies.FOLDER / "contact_sheet.jpg"]:
        assert f"`{path.name}`" in STUDIES
    parts = ("start.py", "search_")
    for path in sorted(studies.FOLDER.rglob("*.py")):
        name = path.relative_to(studies.FOLDER).as_posix()
        assert name.startswith(parts) or f"| `{name}` |" in STUDIES, name


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"\b[A-Z]+_TABLE\b|TODO|FIXME", README + STUDIES)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
