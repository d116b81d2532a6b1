"""Switches on the run-time check of array types, before anything of ours is imported."""

import os
import pathlib
import warnings

import jax
import jaxtyping
import pytest
from jax.experimental.compilation_cache import compilation_cache

# ASTRAEA_NO_TYPECHECK=1 turns it off, to see the library as a user has it.
if not os.environ.get("ASTRAEA_NO_TYPECHECK"):
    jaxtyping.install_import_hook(["astraea_jax", "astraea_ports"], "type_check.checked")


QUICK = "jax_disable_most_optimizations"


@pytest.fixture
def fully_optimised():
    """For slow tests of bits, of compiled programs or of much computing: compiled as for a user."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Compiles slow tests with few passes, twice as fast, where numbers are held to a tolerance.

    A hook, since a module's fixtures are made before a test's own; what a test starts inherits it.
    """
    marks = {mark.name for mark in item.iter_markers()}
    quick = "slow" in marks and not ("core" in marks or "fully_optimised" in item.fixturenames)
    before = jax.config.read(QUICK)
    with pytest.MonkeyPatch.context() as patch:
        if quick:
            patch.setenv(QUICK.upper(), "1")
            jax.config.update(QUICK, True)
        try:
            return (yield)
        finally:
            jax.config.update(QUICK, before)


@pytest.fixture(scope="module")
def kept_programs(tmp_path_factory):
    """A folder of compiled programs, so that another process need not compile them again."""
    folder = tmp_path_factory.mktemp("compiled")
    changes = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.5,
    }
    before = {name: jax.config.values[name] for name in changes}
    for values in (changes, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is changes:
            yield folder


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


MOST_MAPS = 20_000
"""A process on Linux may have 65,530: past that a compiled program ends it with a signal."""


@pytest.fixture(autouse=True)
def few_compiled_programs():
    """Lets compiled programs go once there are many: on a CPU each is mapped memory."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
