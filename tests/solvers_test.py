"""Solvers against Diffusers' recorded grids and trajectories."""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FIXTURES
from safetensors.numpy import load_file

from astraea_jax import solvers

pytestmark = pytest.mark.core

RUNS = {"n10_shift3": (10, 3.0), "n6_shift8": (6, 8.0)}
RECORDED = {
    ("unipc", "diffusers"): "unipc_diffusers",
    ("unipc", "original"): "unipc_original",
    ("dpm++", "original"): "dpmpp_original",
    ("euler", "diffusers"): "euler_diffusers",
    ("euler", "original"): "euler_original_sigmas",
}
TRAJECTORY = dict.fromkeys(RECORDED, 1e-5) | {("unipc", "diffusers"): 2e-5}
EVERY = [(name, grid) for name in solvers.SOLVERS for grid in ("diffusers", "original")]


@pytest.fixture(scope="module")
def recorded():
    return load_file(FIXTURES / "wan/scheduler.safetensors")


@jax.jit
def trajectory(solver, start, velocities):
    """Samples after every step."""

    def step(carry, xs):
        row, velocity = xs
        latents, state = solvers.step(row, carry[1], carry[0], velocity)
        return (latents, state), latents

    return jax.lax.scan(step, (start, solvers.init(start)), (solver, velocities))[1]


@pytest.mark.parametrize("kind", RECORDED, ids="-".join)
@pytest.mark.parametrize("run", RUNS)
def test_grid(recorded, run, kind):
    steps, shift = RUNS[run]
    solver = solvers.make(kind[0], steps, shift=shift, grid=kind[1])
    # Plain Euler was recorded on the original's grid of UniPC.
    prefix = f"{run}.{'unipc_original' if kind == ('euler', 'original') else RECORDED[kind]}."
    assert solver.steps == steps
    assert all(leaf.dtype == np.float32 for leaf in solver)
    np.testing.assert_allclose(solver.sigma, recorded[prefix + "sigmas"][:-1], atol=1e-6)
    timesteps = recorded[prefix + "timesteps"]
    if np.issubdtype(timesteps.dtype, np.integer):
        assert np.array_equal(solver.timestep, timesteps)
    else:
        np.testing.assert_allclose(solver.timestep, timesteps, rtol=1e-6)


@pytest.mark.parametrize("kind", RECORDED, ids="-".join)
@pytest.mark.parametrize("run", RUNS)
def test_trajectory(recorded, run, kind):
    steps, shift = RUNS[run]
    solver = solvers.make(kind[0], steps, shift=shift, grid=kind[1])
    got = trajectory(solver, jnp.asarray(recorded[f"{run}.x0"]), recorded[f"{run}.model_out"])
    expected = recorded[f"{run}.{RECORDED[kind]}.traj"]
    assert np.array_equal(expected[0], recorded[f"{run}.x0"])
    np.testing.assert_allclose(got, expected[1:], atol=TRAJECTORY[kind])


def test_trajectories_tell_the_solvers_apart(recorded):
    runs = [recorded[f"n10_shift3.{name}.traj"] for name in RECORDED.values()]
    for one, other in itertools.combinations(runs, 2):
        assert np.abs(one - other).max() > 5e-3


@pytest.mark.parametrize("shift", [3, 5, 8])
@pytest.mark.parametrize("grid", ["diffusers", "original"])
def test_grid_of_fifty_steps(recorded, shift, grid):
    solver = solvers.unipc(50, shift=float(shift), grid=grid)
    prefix = f"table.n50_shift{shift}.unipc_{grid}."
    np.testing.assert_allclose(solver.sigma, recorded[prefix + "sigmas"][:-1], atol=1e-6)
    assert recorded[prefix + "sigmas"][-1] == 0
    assert np.array_equal(solver.timestep, recorded[prefix + "timesteps"])


@pytest.mark.parametrize(("name", "grid"), EVERY)
@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_last_step_gives_the_clean_sample_exactly(name, grid, steps):
    solver = solvers.make(name, steps, grid=grid)
    rng = np.random.default_rng(steps)
    x, x1, m1, m2, v = (jnp.asarray(a, jnp.float32) for a in rng.normal(size=(5, 3, 4)))
    row = jax.tree.map(lambda leaf: leaf[-1], solver)
    got, _ = solvers.step(row, solvers.SolverState(x1, m1, m2), x, v)
    assert np.array_equal(solver.predict[-1], [0, 1, 0])
    assert np.array_equal(got, x - row.sigma * v)


@pytest.mark.parametrize(("name", "grid"), EVERY)
def test_a_straight_path_is_followed_exactly(name, grid):
    # A model that knows the clean sample: every step lands on the line to it.
    rng = np.random.default_rng(0)
    clean, noise = (jnp.asarray(a, jnp.float32) for a in rng.normal(size=(2, 5)))
    solver = solvers.make(name, 12, grid=grid)
    velocities = jnp.broadcast_to(noise - clean, (12, 5))
    start = (1 - solver.sigma[0]) * clean + solver.sigma[0] * noise
    got = trajectory(solver, start, velocities)
    sigma = np.append(solver.sigma[1:], 0)[:, None]
    np.testing.assert_allclose(got, (1 - sigma) * clean + sigma * noise, atol=5e-6)


def test_history_of_the_first_step_is_not_read():
    # The loop starts from zeros, but a reused buffer may hold anything.
    row = jax.tree.map(lambda leaf: leaf[0], solvers.unipc(5))
    x, v = jnp.ones(3), jnp.full(3, 0.5)
    broken = jnp.full(3, jnp.nan)
    got, _ = solvers.step(row, solvers.SolverState(broken, broken, broken), x, v)
    expected, state = solvers.step(row, solvers.init(x), x, v)
    assert np.array_equal(got, expected)
    assert np.array_equal(state.corrected, x) and np.array_equal(state.clean_1, x - row.sigma * v)


SHIFT = "shift must be a number at least 0.001 and at most 1000"


@pytest.mark.parametrize("shift", [1.0, 3.0, 17.0])
@pytest.mark.parametrize(("name", "grid"), EVERY)
def test_tables_are_finite(name, grid, shift):
    for steps in (1, 2, 3, 5, 100):
        solver = solvers.make(name, steps, shift=shift, grid=grid)
        assert all(np.isfinite(leaf).all() for leaf in solver)
        assert (np.diff(solver.sigma) < 0).all()
        assert solver.sigma[-1] > 0 and solver.sigma[0] <= 1
        assert solver.timestep[-1] >= 0 and solver.timestep[0] <= 1000


@pytest.mark.parametrize("shift", [0.001, 1000.0])
@pytest.mark.parametrize(("name", "grid"), EVERY)
def test_tables_at_the_ends_of_what_is_taken_are_finite(as_a_user, name, grid, shift):
    for steps in (1, np.int64(4), 2000):
        solver = solvers.make(name, steps, shift=np.float32(shift), grid=grid)
        assert all(np.isfinite(leaf).all() for leaf in solver)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: solvers.make("ddim", 4),
            "solver must be one of unipc, dpm\\+\\+, euler; got 'ddim'",
        ),
        (lambda: solvers.make("unipc", 0), r"steps must be an integer in 1\.\.10000; got 0"),
        (lambda: solvers.euler(-3), r"steps must be an integer in 1\.\.10000; got -3"),
        (lambda: solvers.dpmpp(10**9), r"steps must be an integer in 1\.\.10000; got 1000000000"),
        *(
            (lambda shift=shift: solvers.unipc(4, shift=shift), f"{SHIFT}; got {shift}")
            for shift in (0.0, -1.0, float("inf"), float("nan"), 1e-300, 1001.0)
        ),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_types_are_refused(as_a_user):
    with pytest.raises(ValueError, match=r"steps must be an integer in 1\.\.10000; got 2.5"):
        solvers.unipc(2.5)
    with pytest.raises(ValueError, match="grid must be 'diffusers' or 'original'; got 'mine'"):
        solvers.make("unipc", 4, grid="mine")
    with pytest.raises(ValueError, match=f"{SHIFT}; got '3'"):
        solvers.euler(2, shift="3")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
