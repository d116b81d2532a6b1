"""BUILD agrees with the tree and with the imports; planted errors show that the check can fail."""

import pathlib
import sys

import pytest
from build_check import evaluate, problems

ROOT = pathlib.Path(__file__).resolve().parents[1]
LIBRARIES = {
    "astraea_jax": "astraea_jax",
    "astraea_jax.bench": "commands",
    "astraea_jax.cli": "commands",
    "astraea_ports": "ports",
}
FOLDERS = ["astraea_jax", "ports", "tests", "notebooks/studies"]

SOUND = """
load("@rules_python//python:py_library.bzl", "py_library")
load("@rules_python//python:py_test.bzl", "py_test")

py_library(
    name = "lib",
    srcs = ["lib/a.py"],
    deps = ["@pypi//numpy"],
)

[
    py_test(name = path[len("tests/"):-len(".py")], srcs = [path], main = path, deps = [":lib"])
    for path in glob(["tests/*_test.py"])
]
"""


@pytest.fixture
def tree(tmp_path):
    """A small sound tree."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "BUILD").write_text(SOUND)
    (tmp_path / "lib/a.py").write_text("import os\n\nimport numpy as np\n")
    (tmp_path / "tests/a_test.py").write_text("from lib import a\n")
    return tmp_path


def found(tree):
    return problems(tree, {"lib": "lib"}, ["lib", "tests"])


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_sound_tree_has_no_problem(tree):
    assert found(tree) == []


def test_missing_file(tree):
    replace(tree / "BUILD", '["lib/a.py"]', '["lib/a.py", "lib/b.py"]')
    assert found(tree) == ["lib: lib/b.py does not exist"]


def test_missing_main(tree):
    replace(tree / "BUILD", "main = path", 'main = "tests/b_test.py"')
    assert found(tree) == ["a_test: tests/b_test.py does not exist"]


def test_unknown_label(tree):
    replace(tree / "BUILD", '[":lib"]', '[":lib", ":other"]')
    assert found(tree) == ["a_test: no target :other"]


def test_file_in_no_target(tree):
    (tree / "lib/stray.py").write_text("")
    assert found(tree) == ["lib/stray.py is in no target"]


def test_file_in_two_targets(tree):
    with (tree / "BUILD").open("a") as file:
        file.write('py_library(name = "again", srcs = ["lib/a.py"], deps = ["@pypi//numpy"])\n')
    assert found(tree) == ["lib/a.py is in ['lib', 'again']"]


def test_import_of_ours_without_dep(tree):
    replace(tree / "BUILD", '[":lib"]', "[]")
    assert found(tree) == ["a_test: tests/a_test.py imports from lib without a dep on it"]


@pytest.mark.parametrize(
    "line", ["import jax.numpy as jnp", "from jax import lax", "def f():\n  import jax"]
)
def test_import_of_others_without_dep(tree, line):
    (tree / "lib/a.py").write_text(line + "\n")
    assert found(tree) == ["lib: lib/a.py imports from @pypi//jax without a dep on it"]


def test_rule_that_was_not_loaded(tree):
    replace(tree / "BUILD", 'load("@rules_python//python:py_test.bzl", "py_test")', "")
    with pytest.raises(NameError, match="py_test"):
        found(tree)


def test_unknown_load(tree):
    replace(tree / "BUILD", "py_test.bzl", "py_tests.bzl")
    with pytest.raises(ValueError, match=r"unknown load.*py_tests\.bzl"):
        found(tree)


def test_build_is_consistent():
    assert problems(ROOT, LIBRARIES, FOLDERS) == []


def test_build_has_one_test_for_each_test_file():
    tests = {name for name, target in evaluate(ROOT).items() if target["kind"] == "py_test"}
    assert tests == {path.stem for path in (ROOT / "tests").glob("*_test.py")}


def test_build_is_starlark():
    starlark = pytest.importorskip("starlark")
    starlark.parse("BUILD", (ROOT / "BUILD").read_text())
    with pytest.raises(starlark.StarlarkError):
        starlark.parse("BUILD", "import os")


def test_every_test_file_runs_its_tests_when_called_as_a_program():
    # Bazel runs the file; without this line it would find no failure and test nothing.
    last = "sys.exit(pytest.main([__file__]))"
    for path in (ROOT / "tests").glob("*_test.py"):
        lines = path.read_text().rstrip().splitlines()
        assert lines[-2:] == ['if __name__ == "__main__":', f"    {last}"], path.name


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
