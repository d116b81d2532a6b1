"""Timed jit: one executable for each kind of argument, compilation counted apart."""

import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from astraea_jax import timing
from astraea_jax.timing import compile_seconds, stopwatch, timed_jit


def counted(**options):
    """A timed function, and the list of its traces."""
    traces = []

    @timed_jit(**options)
    def scaled(x, factor=1.0, *, power=1):
        """Scales."""
        traces.append(1)
        return {"y": x**power * factor}

    return scaled, traces


def test_one_executable_for_each_kind_of_argument():
    scaled, traces = counted(static=("power",))
    for value in (1.0, 2.0, 3.0):
        got = scaled(jnp.full(3, value), jnp.float32(2.0), power=2)
        np.testing.assert_allclose(got["y"], 2 * value**2)
    assert scaled.num_executables == len(traces) == 1
    scaled(jnp.zeros(4), jnp.float32(2.0), power=2)  # another shape
    scaled(jnp.zeros(4, jnp.int32), jnp.float32(2.0), power=2)  # another dtype
    scaled(jnp.zeros(3), power=2)  # another tree of arguments
    scaled(jnp.zeros(3), jnp.float32(1.0), power=3)  # another static value
    assert scaled.num_executables == 5
    scaled(jnp.ones(4), jnp.float32(7.0), power=2)
    assert scaled.num_executables == 5


def test_numpy_and_python_numbers_are_data():
    scaled, _ = counted(static=("power",))
    for factor in (2.0, 3.0, -1.0):
        np.testing.assert_allclose(scaled(np.full(3, 2.0, np.float32), factor)["y"], 2 * factor)
    assert scaled.num_executables == 1
    # A weakly typed number is not a float32 array: the result's dtype may depend on it.
    scaled(np.ones(3, np.float32), np.float32(2.0))
    assert scaled.num_executables == 2


def test_static_arguments_are_compiled_in():
    scaled, _ = counted(static=("power",))
    for power in (1, 2, 3):
        np.testing.assert_allclose(scaled(jnp.full(2, 2.0), power=power)["y"], 2.0**power)
    assert scaled.num_executables == 3


def test_donated_memory_is_given_up():
    @timed_jit(donate=("state",))
    def advance(state, by):
        return state + by

    state, by = jnp.zeros(1000), jnp.ones(1000)
    after = advance(state, by)
    assert state.is_deleted() and not by.is_deleted()
    np.testing.assert_allclose(after, 1)
    with pytest.raises((RuntimeError, ValueError), match=r"deleted|donated"):
        advance(state, by)


def test_inside_another_jit_it_is_a_part_of_it():
    scaled, traces = counted(static=("power",))

    @jax.jit
    def total(x):
        return scaled(x, 3.0, power=2)["y"].sum()

    assert float(total(jnp.full(4, 2.0))) == 48 and len(traces) == 1
    assert scaled.num_executables == 0
    gradient = jax.grad(lambda x: scaled(x, 3.0, power=2)["y"].sum())(jnp.full(4, 2.0))
    np.testing.assert_allclose(gradient, 12)


def test_called_by_a_traced_function_with_known_arguments_it_is_a_part_of_it():
    scaled, traces = counted()
    jaxpr = jax.make_jaxpr(lambda: scaled(np.ones(3, np.float32))["y"])()
    assert "jit" in str(jaxpr) and len(traces) == 1 and scaled.num_executables == 0
    assert not timing.tracing() and jax.eval_shape(lambda: jnp.bool_(timing.tracing())).shape == ()
    seen = []
    threading.Thread(target=lambda: seen.append(timing.tracing())).start()
    jax.vmap(lambda x: seen.append(timing.tracing()) or x)(jnp.ones(2))
    jax.jit(lambda x: seen.append(timing.tracing()) or x)(jnp.ones(2))
    assert seen == [False, True, True]


def products(size=4):
    """A timed product of matrices, and the list of its traces."""
    traces = []

    @timed_jit()
    def product(x):
        traces.append(1)
        return x @ x

    return product, traces, jnp.full((size, size), 1 + 2**-10, jnp.float32)


def test_another_precision_is_another_program():
    product, traces, x = products()
    for precision in (None, "highest", "BF16_BF16_F32"):
        with jax.default_matmul_precision(precision):
            product(x)
            text = product.lower(x).as_text()
        asked = {None: "DEFAULT, DEFAULT", "highest": "HIGHEST, HIGHEST"}.get(precision, "bf16")
        assert asked in text
    product(x)
    assert len(traces) == product.num_executables == 3


def test_x64_is_another_program():
    product, _, x = products()
    assert product(np.asarray(x, np.float64)).dtype == jnp.float32
    with jax.enable_x64(True):
        assert product(np.asarray(x, np.float64)).dtype == jnp.float64
    assert product(np.asarray(x, np.float64)).dtype == jnp.float32
    assert product.num_executables == 2


def test_another_mesh_is_another_program():
    seen = []

    @timed_jit()
    def named(x):
        seen.append(jax.sharding.get_abstract_mesh().axis_names)
        return x + 1

    named(jnp.ones(3))
    for name in ("data", "rows", "data"):
        with jax.set_mesh(jax.make_mesh((1,), (name,))):
            named(jnp.ones(3))
    assert seen == [(), ("data",), ("rows",)]


@pytest.mark.parametrize(
    "name", ["jax_disable_most_optimizations", "jax_compiler_enable_remat_pass"]
)
def test_other_optimisations_are_another_program(name):
    product, _, x = products()
    product(x)
    before = jax.config.values[name]
    jax.config.update(name, not before)
    try:
        product(x)
        product(x)
    finally:
        jax.config.update(name, before)
    assert product.num_executables == 2
    product(x)
    assert product.num_executables == 2


def test_without_jit_the_plain_function_runs():
    seen = []

    @timed_jit(static=("by",))
    def moved(x, *, by):
        seen.append(isinstance(x, jax.core.Tracer))
        return x + by

    moved(jnp.ones(2), by=1)
    with jax.disable_jit():
        np.testing.assert_array_equal(moved(jnp.ones(2), by=2), 3)
    assert seen == [True, False]


def test_a_nan_is_found_and_placed():
    @timed_jit(donate=("x",))
    def root(x):
        return jnp.log(x - 2) * 0 + 1

    assert np.isnan(root(jnp.ones(2))).all()
    with (
        jax.debug_nans(True),
        pytest.raises(FloatingPointError, match=r"invalid value \(nan\).*log"),
    ):
        root(jnp.ones(2))


def test_lower_is_that_of_jit():
    scaled, _ = counted(static=("power",))
    shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    compiled = scaled.lower(shape, power=2).compile()
    np.testing.assert_allclose(compiled(jnp.full(3, 3.0))["y"], 9)
    scaled(np.full(3, 3.0, np.float32), power=2)
    assert scaled.num_executables == 1


def test_it_keeps_the_functions_name_and_docstring():
    scaled, _ = counted()
    assert (scaled.__name__, scaled.__doc__) == ("scaled", "Scales.")


def test_compilation_is_counted_apart():
    @timed_jit()
    def slow(x):
        time.sleep(0.2)  # at trace time
        return x + 1

    before = compile_seconds()
    with stopwatch() as first:
        jax.block_until_ready(slow(jnp.ones(3)))
        time.sleep(0.1)
    assert first.compile >= 0.2 and compile_seconds() - before == pytest.approx(first.compile)
    assert first.run >= 0.1
    with stopwatch() as second:
        jax.block_until_ready(slow(jnp.ones(3)))
        time.sleep(0.05)
    assert second.compile == 0 and second.run >= 0.05


def test_another_threads_compilation_is_not_counted():
    began, end = threading.Event(), threading.Event()

    @timed_jit()
    def slow(x):
        began.set()
        end.wait(10)
        return x + 1

    thread = threading.Thread(target=slow, args=(jnp.ones(3),))
    with stopwatch() as watch:
        thread.start()
        began.wait(10)
        time.sleep(0.05)
        end.set()
        thread.join()
    assert watch.compile == 0 and watch.run >= 0.05


def test_run_and_compile_add_up_to_the_wall_clock():
    scaled, _ = counted()
    began = time.perf_counter()
    with stopwatch() as watch:
        jax.block_until_ready(scaled(jnp.ones(5)))
    wall = time.perf_counter() - began
    assert 0 < watch.run + watch.compile <= wall
    assert wall - watch.run - watch.compile < 0.05


def test_a_stage_that_fails_is_timed_and_its_compilation_counted():
    @timed_jit()
    def broken(x):
        time.sleep(0.05)
        raise KeyError("no such thing")

    before = compile_seconds()
    with pytest.raises(KeyError, match="no such thing"), stopwatch() as watch:
        broken(jnp.ones(2))
    assert watch.compile >= 0.05 and watch.run >= 0
    assert compile_seconds() - before >= 0.05 and broken.num_executables == 0


def test_stopwatches_start_at_nothing():
    watch = timing.Stopwatch()
    assert (watch.run, watch.compile) == (0.0, 0.0)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
