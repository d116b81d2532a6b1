"""Populations: the same numbers as one schedule at a time, whatever the plan and the devices."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_inputs, small_model
from other_models import grouped_inputs

from astraea_jax import solvers
from astraea_jax.denoise import denoise
from astraea_jax.methods import METHODS, Astraea, Dense, StepLevel
from astraea_jax.model import fingerprint
from astraea_jax.population import Scorer, lanes
from astraea_jax.selection import SelectionConfig

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = 5
LEVELS = np.array(
    [
        [10, 10, 10, 10, 10],
        [10, 0, 10, 0, 0],
        [10, 3, 0, 0, 8],
        [10, 0, 0, 0, 0],
        [10, 8, 3, 10, 3],
    ],
    np.int8,
)
WHOLE = np.where(LEVELS > 5, 10, 0).astype(np.int8)


def scorer(method, *, model=None, inputs=None, **options):
    return Scorer(
        model or small_model(), *(inputs or small_inputs(videos=2)),
        solver=solvers.unipc(STEPS), method=method, guidance=3.0, key=jax.random.key(7), **options,
    )  # fmt: skip


def one_by_one(method, levels, model, inputs):
    runs = [
        denoise(
            model, *inputs, solver=solvers.unipc(STEPS), schedule=jnp.asarray(row),
            method=method, guidance=3.0, key=jax.random.key(7),
        ).latents
        for row in levels
    ]  # fmt: skip
    return np.stack(runs)


@pytest.mark.slow
def test_lanes_give_what_each_schedule_gives_alone():
    model, inputs, method = (
        small_model(),
        small_inputs(videos=2),
        StepLevel(corrects=True),
    )
    # Three lanes for five schedules of unlike length.
    found = scorer(method, lanes=3, batch=5, dense_start=1).latents(WHOLE)
    expected = one_by_one(method, WHOLE, model, inputs)
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


def test_a_small_population_is_scored_as_each_schedule_alone():
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is all of this test
    try:
        inputs, levels = small_inputs(grid=(1, 2, 5)), np.array([[10] * 3, [10, 0, 10]], np.int8)
        settings = {"solver": solvers.unipc(3), "method": StepLevel(), "guidance": 3.0}
        score = Scorer(small_model(), *inputs, **settings, lanes=2, batch=3)
        errors = score(np.concatenate([levels, [[10, 0, 0]]]))
        alone = [
            denoise(small_model(), *inputs, schedule=jnp.asarray(row), **settings).latents
            for row in levels
        ]
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
    expected = np.square(np.asarray(alone[1]) - np.asarray(alone[0])).mean()
    assert errors.shape == (3, 1) and errors[0] < 1e-9
    assert np.allclose(errors[1], expected, rtol=1e-4) and errors[1] < errors[2]


@pytest.mark.slow
def test_token_wise_schedules_are_scored_one_after_another():
    model, inputs = grouped_inputs()
    method = Astraea(SelectionConfig("block", "separate", rank="random"), traced_level="loop")
    found = scorer(method, model=model, inputs=inputs, batch=6).latents(LEVELS)
    expected = one_by_one(method, LEVELS, model, inputs)
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.slow
def test_plans_and_a_shared_dense_start_agree():
    levels = WHOLE.copy()
    levels[:, 1] = 10
    method = StepLevel("residual")
    errors = [
        scorer(method, plan=plan, dense_start=start, lanes=2, batch=5)(levels)
        for plan, start in (("lanes", 1), ("lanes", 2), ("map", 2))
    ]
    assert errors[0].shape == (5, 2)
    for other in errors[1:]:
        assert np.allclose(other, errors[0], rtol=1e-3, atol=1e-9)
    assert (errors[0][0] < 1e-9).all() and (errors[0][3] > 1e-4).all()


@pytest.mark.slow
def test_the_error_of_pixels_is_that_of_what_decode_gives():
    plain = scorer(StepLevel(), lanes=2, batch=5)
    doubled = scorer(StepLevel(), lanes=2, batch=5, decode=lambda latents: 2 * latents)
    assert np.allclose(doubled(WHOLE), 4 * plain(WHOLE), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": Dense(), "plan": "lanes"}, 'dense has no plan "lanes"'),
        ({"plan": "fast"}, "plan must be 'lanes' or 'map'; got 'fast'"),
        ({"dense_start": 6}, r"dense_start must be an integer in 1\.\.5; got 6"),
        ({"lanes": 0}, r"lanes must be an integer in 1\.\.10000; got 0"),
        ({"lanes": 10**9}, r"lanes must be an integer in 1\.\.10000; got 1000000000"),
        ({"batch": -1}, r"batch must be an integer in 1\.\.10000; got -1"),
        ({"inputs": small_inputs(videos=2)._replace(context=jnp.zeros((3, 5, 8)))}, "of 4 rows"),
    ],
)
def test_what_cannot_be_is_refused(as_a_user, options, message):
    with pytest.raises(ValueError, match=message):
        scorer(**{"method": StepLevel(), **options})


@pytest.mark.slow
def test_levels_are_checked_as_everywhere_and_no_row_gives_none(as_a_user):
    score = scorer(StepLevel(), lanes=2, batch=5, dense_start=2)
    for levels, message in (
        (WHOLE[:, :4], r"schedule 1: levels must be .* one per step \(5\); got 4 values"),
        ([[10] * 5, [10, 10, 12, 0, 0]], r"schedule 2: levels must be .*; level 3 is 12"),
        ([[10] * 5, [10, 10, 5, 0, 0]], "schedule 2: step-level computes whole steps, .* level 5"),
        ([[10, 0, 10, 0, 0]], r"schedule 1: the first 2 levels must be 10 .* got 0"),
        ("10000", r"expected levels \[S, 5\]; got '10000'"),
    ):
        for call in (score, score.latents):
            with pytest.raises(ValueError, match=message):
                call(levels)
    for nothing in ([], WHOLE[:0]):
        assert score(nothing).shape == (0, 2)
        assert score.latents(nothing).shape == (0, *small_inputs(videos=2).latents.shape)


class Eager(StepLevel):
    """Whole steps, of which it skips none."""

    def decide(self, evaluation, inputs, state):
        return jnp.int32(1), state


class Doubled(Astraea):
    """ASTRAEA with twice the velocity."""

    def forward(self, *args):
        forward = super().forward(*args)
        return forward._replace(velocity=2 * forward.velocity)


@pytest.mark.core
def test_lanes_are_only_for_methods_that_they_honour():
    for name, method in METHODS.items():
        assert lanes.can_run_in_lanes(method) == name.startswith("step-level")
    for method in (Eager(), Doubled()):
        assert not lanes.can_run_in_lanes(method)
        with pytest.raises(ValueError, match='has no plan "lanes"; use "map"'):
            scorer(method, plan="lanes")


@pytest.mark.slow
def test_a_method_of_its_own_is_scored_as_it_computes():
    model, inputs = small_model(), small_inputs(videos=2)
    for method in (Eager(), Doubled(traced_level="loop")):
        found = scorer(method, lanes=2, batch=2).latents(WHOLE[1:3])
        expected = one_by_one(method, WHOLE[1:3], model, inputs)
        assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.slow
def test_lanes_decide_of_a_level_as_the_method_does():
    """Levels that a method can't do are refused; where they are traced, lanes skip as it skips."""
    model, inputs = small_model(), small_inputs(videos=2)
    settings = lanes.Settings(StepLevel(), model.geometry(inputs.latents.shape), 2, False)
    solver, key, scale = solvers.unipc(STEPS), jax.random.key(7), jnp.float32(3)
    prepared, state = lanes.denoise_start(
        model, *inputs, solver, scale, key, settings=settings, dense_start=1, precision=None
    )
    levels = jnp.array([[10, 5, 10, 0, 10], [10, 0, 10, 0, 10]], jnp.int8)
    found = lanes.denoise_many(
        model, prepared, state, solver, levels, guidance=scale, key=key, settings=settings,
        dense_start=1, plan="lanes", lanes=2,
    )  # fmt: skip
    assert np.array_equal(found[0], found[1])


@pytest.mark.slow
@pytest.mark.parametrize("solver", [solvers.euler, solvers.unipc])
def test_correction_is_the_run_again_along_the_line_between_velocities(solver):
    """The gap's weights against what they stand for: the skipped steps taken a second time."""
    model, inputs = small_model(), small_inputs()
    table = solver(8)
    levels = (10, 10, 0, 0, 10, 0, 10, 0)
    row = lambda index: jax.tree.map(lambda leaf: jnp.asarray(leaf[index]), table)  # noqa: E731
    forward = jax.jit(lambda x, t: model(x, t, inputs.context))
    latents, history = inputs.latents, solvers.init(inputs.latents)
    start = index = velocity = None
    for step, level in enumerate(levels):
        if level:
            pair = forward(jnp.concatenate([latents] * 2), jnp.full((2,), row(step).timestep))
            conditional, unconditional = jnp.split(pair, 2)
            now = unconditional + 3.0 * (conditional - unconditional)
            if start is not None:
                latents, history = start
                for again in range(index, step):
                    share = (row(index).sigma - row(again).sigma) / (
                        row(index).sigma - row(step).sigma
                    )
                    line = (1 - share) * velocity + share * now
                    latents, history = solvers.step(row(again), history, latents, line)
            start, index, velocity = (latents, history), step, now
        latents, history = solvers.step(row(step), history, latents, velocity)
    for method in (StepLevel(corrects=True), Astraea(traced_level="loop", corrects=True)):
        found = denoise(
            model, *inputs, solver=table, schedule=jnp.asarray(levels, jnp.int8), method=method,
            guidance=3.0,
        ).latents  # fmt: skip
        assert np.abs(found - latents).max() < 1e-5 * np.abs(latents).max()


@pytest.mark.slow
@pytest.mark.core
@pytest.mark.parametrize(
    "method", [StepLevel(corrects=True), Astraea(traced_level="loop", corrects=True)]
)
def test_correction_at_full_budget_is_the_dense_model_bit_for_bit(method):
    inputs, full = small_inputs(), jnp.full(4, 10, jnp.int8)
    runs = [
        denoise(
            small_model(), *inputs, solver=solvers.unipc(4), schedule=full, method=each,
            guidance=3.0, driver=driver,
        ).latents
        for each, driver in ((Dense(), "dynamic"), (method, "dynamic"), (method, "static"))
    ]  # fmt: skip
    assert np.array_equal(runs[0], runs[1]) and np.array_equal(runs[0], runs[2])


def test_correction_needs_a_velocity_that_is_kept():
    with pytest.raises(ValueError, match="kept"):
        Astraea(SelectionConfig(velocity="recomputed"), corrects=True)
    with pytest.raises(ValueError, match="residual"):
        StepLevel("residual", corrects=True)


@pytest.mark.slow
def test_a_fingerprint_tells_models_apart_and_not_dtypes():
    model = small_model()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    other = jax.tree.map(lambda leaf: leaf + 1, model)
    assert fingerprint(model) == fingerprint(half) != fingerprint(other)


DEVICES = """
import sys
sys.path[:0] = [{tests!r}]
import jax, numpy as np
import population_test as here
assert jax.device_count() == 8
levels = np.concatenate([here.WHOLE] * 4)[:19]
levels[::3, 2] = 10
one = here.scorer(here.StepLevel(corrects=True), lanes=2, batch=4)(levels)
many = here.scorer(here.StepLevel(corrects=True), lanes=2, batch=4, devices=jax.devices())(levels)
assert np.array_equal(one, many), np.abs(one - many).max()
print("alike")
"""

PROCESSES = """
import sys
import jax, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize("localhost:{port}", 2, int(sys.argv[1]))
from astraea_jax.search import processes
seen = 0
def score(levels):
    global seen
    seen += len(levels)
    return np.stack([levels.sum(axis=1), levels[:, 1]], axis=1)
if jax.process_index():
    assert processes.help_score(score) == 2 and seen == 5
else:
    levels = np.random.default_rng(0).integers(0, 11, (7, 5)).astype(np.int8)
    with processes.SharedScore(score) as shared:
        for part in (levels, levels[:2]):
            assert np.array_equal(shared(part), score(part))
    print("alike")
"""


def python(code, *arguments, **environment):
    path = os.pathsep.join(str(ROOT / part) for part in ("", "ports"))
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", **environment},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_eight_devices_give_the_same_bits_as_one(fully_optimised):
    code = DEVICES.format(tests=str(ROOT / "tests"))
    process = python(code, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    assert process.communicate(timeout=300)[0] == "alike\n" and process.returncode == 0


@pytest.mark.slow
def test_two_processes_share_a_population():
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    code = PROCESSES.format(port=port)
    both = [python(code, str(index)) for index in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert said[0].endswith("alike\n") and [process.returncode for process in both] == [0, 0]


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
