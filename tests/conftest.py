"""Switches on the run-time check of array types, before anything of ours is imported."""

import os
import warnings

import jaxtyping
import pytest

# ASTRAEA_NO_TYPECHECK=1 turns it off, to see the library as a user has it.
if not os.environ.get("ASTRAEA_NO_TYPECHECK"):
    jaxtyping.install_import_hook(["astraea_jax", "astraea_ports"], "type_check.checked")


@pytest.fixture
def as_a_user():
    """Turns the type check off within a test: a wrong array must then meet our own message."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture
def in_an_empty_folder(tmp_path, monkeypatch):
    """Where a test of the command line runs; the way a command shows warnings ends with it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
