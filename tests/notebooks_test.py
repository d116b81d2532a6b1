"""The notebooks as a reader meets them: with their pictures, and one way to install."""

import base64
import json
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST, LARGEST_PICTURE = 1_000_000, 150_000
"""Bytes of a notebook, and of a picture in one."""

PICTURES = ("image/png", "image/jpeg")


def code_cells(path):
    cells = json.loads(path.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def outputs(path):
    return [output for cell in code_cells(path) for output in cell["outputs"]]


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_as_it_ran(path):
    counts = [cell["execution_count"] for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1)), "execute it from its beginning"
    for output in outputs(path):
        assert output["output_type"] != "error" and output.get("name") != "stderr", output
    last = code_cells(path)[-1]
    assert "assert " in "".join(last["source"])
    assert "as it should be" in json.dumps(last["outputs"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_pictures_that_are_small(path):
    assert path.stat().st_size < LARGEST
    data = [output.get("data", {}) for output in outputs(path)]
    pictures = [each[kind] for each in data for kind in PICTURES if kind in each]
    assert pictures
    for picture in pictures:
        text = picture if isinstance(picture, str) else "".join(picture)
        assert 1000 < len(base64.b64decode(text)) < LARGEST_PICTURE


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_names_no_place_of_the_machine_that_ran_it(path):
    said = json.dumps(
        [
            output.get("text", []) or output.get("data", {}).get("text/plain", [])
            for output in outputs(path)
        ]
    )
    assert not re.search(r"/(?:home|root|tmp|work|Users|var)/", said)


def test_all_install_alike():
    (cell,) = {"".join(code_cells(path)[0]["source"]) for path in NOTEBOOKS}
    assert "git+https://github.com/astraea-jax/astraea_jax" in cell
    (install,) = (line for line in cell.splitlines() if "%pip" in line)
    assert "{extra}" in install
    # As the cell would run where a plugin is, and where there is none.
    lines = [line[4:] for line in cell.splitlines()[3:] if "%pip" not in line]
    program = "\n".join(line for line in lines if "import find_spec" not in line)
    for found, expected in (
        ({"jax", "jax_cuda12_plugin"}, ",cuda12"),
        ({"jax", "jax_cuda13_plugin"}, ",cuda13"),
        ({"jax", "libtpu"}, ",tpu"),
        ({"jax"}, ""),
    ):
        names = {"find_spec": found.__contains__}
        exec(program, names)
        assert names["extra"] == expected


def test_the_install_cells_extras_are_the_packages_own():
    pyproject = (ROOT / "pyproject.toml").read_text()
    cell = "".join(code_cells(NOTEBOOKS[0])[0]["source"])
    for extra in re.findall(r'": ",(\w+)"', cell):
        # One that names jax's own extra moves jax, jaxlib and the plugin together.
        assert f'\n{extra} = ["jax[{extra}]"]' in pyproject
    for name in re.findall(r"astraea-jax\[(\w+)", cell):
        assert f"\n{name} = [" in pyproject


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
