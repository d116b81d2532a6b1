"""The scripts of notebooks/studies as modules, for the tests of what the tables are made by."""

import contextlib
import importlib
import pathlib
import sys
import types

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "notebooks" / "studies"


def study(name: str) -> types.ModuleType:
    """A script by its name; as when it is run, its own folder is where it finds the others."""
    sys.path.insert(0, str(FOLDER))
    try:
        module = importlib.import_module(name)
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(FOLDER))
    assert module.__file__ is not None and pathlib.Path(module.__file__).parent == FOLDER, module
    return module
