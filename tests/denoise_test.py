"""The exactness ladder: dense equality, drivers, oracle, invariance, one trace, no copies."""

import dataclasses
import re
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import (
    random_levels,
    slow_but,
    small_inputs,
    small_model,
)
from jax.sharding import Mesh, PartitionSpec
from other_models import grouped_inputs, twice_grouped_inputs

from astraea_jax import denoise as loop
from astraea_jax import progress, solvers
from astraea_jax.checks import Refusal
from astraea_jax.denoise import denoise
from astraea_jax.methods import METHODS, Astraea, Dense, FixedToken, StepLevel, base, token_wise
from astraea_jax.model import Geometry, Kind, Stack, dense_forward
from astraea_jax.schedule import Schedule, rows_at
from astraea_jax.selection import PUBLISHED, SelectionConfig

GUIDANCE = 3.0
CONFIGS = {
    "default": SelectionConfig(),
    "published": PUBLISHED,
    "block residual": SelectionConfig(scope="block", branches="separate"),
    "block last computed": SelectionConfig(
        scope="block", reference="last_computed", branches="separate", velocity="recomputed"
    ),
    "block output last computed": SelectionConfig(
        scope="block", reuse="output", reference="last_computed", count_skipped=True
    ),
    "block sketch": SelectionConfig(scope="block", reference="sketch", change="abs"),
    "step sketch": SelectionConfig(reference="sketch", lse_heads="max", normalise="none"),
    "step last computed": SelectionConfig(reference="last_computed", reuse="output"),
    "signed": SelectionConfig(scope="block", change="signed", w_beta=0.0),
    "random": SelectionConfig(scope="block", rank="random", branches="separate"),
}


@pytest.fixture(autouse=True)
def quickly_compiled(request):
    """Compiles with few passes, twice as fast, where numbers are held to a tolerance."""
    few_passes = "fully_optimised" not in request.fixturenames
    jax.config.update("jax_disable_most_optimizations", few_passes)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def in_a_loop(method):
    """The method with its rows in a loop, which compiles faster, and gives the same."""
    return (
        dataclasses.replace(method, traced_level="loop") if isinstance(method, Astraea) else method
    )


def run(method, levels, *, solver=None, driver="dynamic", inputs=None, model=None, **kwargs):
    """Denoised latents of the small model."""
    inputs = small_inputs() if inputs is None else inputs
    solver = solvers.unipc(len(levels)) if solver is None else solver
    return denoise(
        small_model() if model is None else model,
        inputs.latents,
        inputs.context,
        solver=solver,
        schedule=Schedule(levels),
        method=in_a_loop(method) if driver == "dynamic" else method,
        guidance=kwargs.pop("guidance", GUIDANCE),
        driver=driver,
        **kwargs,
    )


DENSE_EQUALS = [
    *((name, method, "dynamic") for name, method in METHODS.items() if method.by_level),
    *((name, Astraea(CONFIGS[name]), "dynamic") for name in ("block sketch", "step sketch")),
    *((name, METHODS[name], "static") for name in ("astraea", "astraea-published", "step-level")),
    ("block last computed", Astraea(CONFIGS["block last computed"]), "static"),
]


QUICK = {"astraea-dynamic", "step-level-dynamic", "astraea-static", "step-level-static"}


@pytest.mark.parametrize(
    ("method", "driver"),
    [
        pytest.param(
            method,
            driver,
            id=f"{name}-{driver}",
            marks=[pytest.mark.slow] * (f"{name}-{driver}" not in QUICK),
        )
        for name, method, driver in DENSE_EQUALS
    ],
)
@pytest.mark.usefixtures("fully_optimised")
@pytest.mark.core
def test_budget_one_equals_dense_bit_for_bit(method, driver):
    # A grid of its own, so that no program that was compiled quickly is used again.
    inputs = small_inputs(grid=(3, 5, 4))
    dense = run(Dense(), (10,) * 4, inputs=inputs)
    full = run(method, (10,) * 4, driver=driver, inputs=inputs)
    assert np.array_equal(dense.latents, full.latents)
    assert np.abs(np.asarray(dense.latents)).max() > 0


@pytest.mark.slow
@pytest.mark.usefixtures("fully_optimised")
@pytest.mark.core
def test_grouped_model_at_budget_one_equals_dense():
    model, inputs = grouped_inputs()
    runs = [
        run(method, (10,) * 3, model=model, inputs=inputs).latents
        for method in (Dense(), Astraea(), Astraea(PUBLISHED))
    ]
    assert np.array_equal(runs[0], runs[1]) and np.array_equal(runs[0], runs[2])


@pytest.mark.core
def test_dense_loop_equals_the_plain_forward_pass():
    inputs, model = small_inputs(), small_model()
    solver = solvers.euler(1)
    velocity = dense_forward(
        model,
        jnp.concatenate([inputs.latents] * 2),
        jnp.full((2,), solver.timestep[0]),
        inputs.context,
    )
    guided = velocity[1] + GUIDANCE * (velocity[0] - velocity[1])
    got = run(Dense(), (10,), solver=solver).latents[0]
    np.testing.assert_allclose(got, inputs.latents[0] - guided, rtol=1e-5, atol=1e-5)


ORACLE = [
    "default", "published", "block residual", "block sketch", "block output last computed",
    "step last computed", "signed", "random",
]  # fmt: skip
CORE = {"default", "published", "block sketch"}


@pytest.mark.parametrize("name", slow_but({"default", "published"}, ORACLE, core=CORE))
def test_dynamic_equals_static_equals_masked_oracle(name):
    config = CONFIGS[name]
    rng = np.random.default_rng(list(CONFIGS).index(name))
    levels, key = random_levels(rng, 6), jax.random.key(5)
    inputs = small_inputs(7)
    dynamic = run(Astraea(config), levels, inputs=inputs, key=key)
    static = run(Astraea(config), levels, inputs=inputs, key=key, driver="static")
    expected = oracle.denoise(
        small_model(), inputs.latents, inputs.context, solver=solvers.unipc(6), levels=levels,
        config=config, guidance=GUIDANCE, key=key,
    )  # fmt: skip
    scale = np.abs(np.asarray(expected)).max()
    np.testing.assert_allclose(dynamic.latents, static.latents, atol=1e-5 * scale)
    np.testing.assert_allclose(dynamic.latents, expected, atol=2e-5 * scale)


@pytest.mark.slow
def test_ways_to_run_a_traced_level_agree():
    inputs, model, levels = small_inputs(3), small_model(), (10, 4, 0, 7, 10, 1)
    static = run(Astraea(), levels, inputs=inputs, driver="static").latents
    scale = np.abs(np.asarray(static)).max()
    for how in ("branch", "loop"):
        got = denoise(
            model, inputs.latents, inputs.context, solver=solvers.unipc(6),
            schedule=Schedule(levels), method=Astraea(traced_level=how), guidance=GUIDANCE,
        )  # fmt: skip
        np.testing.assert_allclose(got.latents, static, atol=1e-5 * scale)


@pytest.mark.parametrize("scope", slow_but({"step"}, ["step", "block"]))
def test_rows_in_whole_tiles_give_the_same(scope, monkeypatch):
    """As at full size, where 18 rows of 60 are laid out as 24."""
    seen, first_rows = [], token_wise.Run._first_rows

    def spied(*arguments):
        seen.append(first_rows(*arguments))
        return seen[-1]

    monkeypatch.setattr(token_wise, "FEW_ROWS", 1)
    monkeypatch.setattr(token_wise.Run, "_first_rows", spied)
    # An age that nobody else has, so that no program without whole tiles is taken up again.
    method, levels = Astraea(SelectionConfig(scope=scope, w_beta=0.07)), (10, 3, 0, 3, 10, 3)
    static = run(method, levels, driver="static").latents
    assert {indices.shape for indices in seen} == {(2, 24)}
    dynamic = run(method, levels).latents
    scale = np.abs(np.asarray(dynamic)).max()
    np.testing.assert_allclose(static, dynamic, atol=1e-5 * scale)


@pytest.mark.parametrize("name", slow_but({"default"}, ["default", "published", "block sketch"]))
def test_grouped_model_equals_masked_oracle(name):
    model, inputs = grouped_inputs()
    levels, key = (10, 5, 0, 3, 8), jax.random.key(1)
    expected = oracle.denoise(
        model, inputs.latents, inputs.context, solver=solvers.euler(5), levels=levels,
        config=CONFIGS[name], guidance=GUIDANCE, key=key,
    )  # fmt: skip
    for driver in ("dynamic", "static"):
        got = run(
            Astraea(CONFIGS[name]), levels, model=model, inputs=inputs, key=key, driver=driver,
            solver=solvers.euler(5),
        )  # fmt: skip
        scale = np.abs(np.asarray(expected)).max()
        np.testing.assert_allclose(got.latents, expected, atol=2e-5 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["default", "block residual", "step sketch"])
def test_a_model_of_two_splits_equals_masked_oracle(name):
    model, inputs = twice_grouped_inputs()
    levels, key = (10, 1, 0, 2, 3), jax.random.key(1)
    expected = oracle.denoise(
        model, inputs.latents, inputs.context, solver=solvers.euler(5), levels=levels,
        config=CONFIGS[name], guidance=GUIDANCE, key=key,
    )  # fmt: skip
    booked = Schedule(levels).realised_budget(52, (4, 13))
    for driver in ("dynamic", "static"):
        got = run(
            Astraea(CONFIGS[name]), levels, model=model, inputs=inputs, key=key, driver=driver,
            solver=solvers.euler(5), trace=True,
        )  # fmt: skip
        scale = np.abs(np.asarray(expected)).max()
        np.testing.assert_allclose(got.latents, expected, atol=2e-5 * scale)
        np.testing.assert_allclose(got.trace.computed.mean(), booked, rtol=1e-6)


@pytest.mark.parametrize(
    "name", ["default", pytest.param("block residual", marks=pytest.mark.slow)]
)
def test_each_kind_of_block_computes_equal_rows_of_its_groups(name):
    """What a step at level 2 changes in the cache, against what is booked for it."""
    model, inputs = twice_grouped_inputs()
    geometry = model.geometry(inputs.latents.shape)
    settings = loop.Settings(Astraea(CONFIGS[name]), geometry, 2, False)
    prepared, state = loop.start_static(model, *inputs, settings=settings)
    caches, solver = [], solvers.euler(2)
    for index, level in enumerate((10, 2)):
        row = jax.tree.map(lambda leaf, i=index: leaf[i], solver)
        state, _ = loop.static_step(
            model, prepared, state, row, *map(np.int32, (level, index, 2)), jnp.float32(GUIDANCE),
            jax.random.key(0), settings=settings, mode=settings.method.static_mode(level),
        )  # fmt: skip
        caches.append(np.asarray(state.method.cache.out))  # the next step takes it
    computed = (caches[0] != caches[1]).any(axis=-1)
    for block, rows in enumerate(computed):
        frames = rows.reshape(2, 4, 13)
        of_groups = frames.sum(axis=1 + (block % 2 == 0))
        groups = geometry.kinds[block % 2].groups.number
        assert (of_groups == rows_at(2, 52, groups) // groups).all()


@pytest.mark.parametrize("reuse", ["velocity", "residual"])
@pytest.mark.core
def test_step_level_drivers_agree(reuse):
    levels = (10, 0, 10, 0, 0, 10)
    dynamic = run(StepLevel(reuse), levels)
    static = run(StepLevel(reuse), levels, driver="static")
    np.testing.assert_allclose(dynamic.latents, static.latents, atol=1e-6)
    assert not np.allclose(dynamic.latents, run(Dense(), (10,) * 6).latents, atol=1e-3)


def test_step_level_velocity_reuse_repeats_the_velocity():
    # With Euler, a skipped step moves on along the same line: two steps are one longer step.
    levels, solver = (10, 0), solvers.euler(2)
    latents = run(StepLevel(), levels, solver=solver).latents
    longer = solvers.Solver(
        solver.sigma[:1], solver.timestep[:1], solver.correct[:1], np.float32([[0, 1, 0]])
    )
    np.testing.assert_allclose(latents, run(Dense(), (10,), solver=longer).latents, atol=1e-5)


@pytest.mark.core
def test_a_schedule_of_whole_steps_needs_no_token_wise_method():
    # What a search of all levels ends at ships as a schedule of whole steps.
    levels = (10, 10, 0, 10, 0, 0, 10, 0)
    of_tokens, of_steps, plain = (
        run(METHODS[method], levels, driver="static").latents
        for method in ("astraea-corrected", "step-level-corrected", "step-level")
    )
    assert np.array_equal(of_tokens, of_steps) and not np.allclose(of_steps, plain)


@jax.tree_util.register_static
class NoModel:
    """What the loop needs of a model whose velocities are given."""

    cache_dtype = jnp.dtype(jnp.float32)

    def unpatchify(self, patches, geometry):
        return patches[:, None, None]


def corrected_run(solver, velocities, fresh, *, branches, guidance=GUIDANCE):
    """The loop's steps with velocities [T, branch, N] that are given, reused where not fresh."""
    method = Astraea(SelectionConfig(branches=branches), corrects=True)
    count = velocities.shape[2]
    settings = loop.Settings(
        method, Geometry((1, 1, count), 1, 1, (Stack(1, (Kind(),)),)), 2, False
    )
    model = NoModel()
    state = loop.start(model, jnp.ones((1, 1, 1, count, 1)), settings)

    @jax.jit
    def step(state, row, velocity, fresh):
        forward = base.Forward(velocity[..., None], (), (), fresh)
        return loop.advance(model, state, forward, row, jnp.float32(guidance), settings)

    state = state._replace(method=())
    for index, (velocity, now) in enumerate(zip(velocities, fresh, strict=True)):
        row = jax.tree.map(lambda leaf, i=index: leaf[i], solver)
        state = step(state, row, velocity, now)
    return np.asarray(state.latents)[0, 0, 0, :, 0]


def test_correction_of_a_scalar_whose_branches_are_computed_apart():
    """Three steps; at the second the conditional branch alone is computed."""
    solver = solvers.euler(3)
    s0, s1, s2 = (float(sigma) for sigma in solver.sigma)
    conditional, unconditional = np.float32([0.5, 1.1, 0.3]), np.float32([0.1, 0.1, 0.9])
    velocities = np.stack([conditional, unconditional], axis=1)[..., None]
    fresh = np.array([[True, True], [True, False], [True, True]])[..., None]
    # Taken again: the unconditional velocity of the second step lies on the line to the third's.
    line = 0.1 + (0.9 - 0.1) * (s0 - s1) / (s0 - s2)
    guided = [u + 3 * (c - u) for c, u in ((0.5, 0.1), (1.1, line), (0.3, 0.9))]
    retaken = 1 - guided[0] * (s0 - s1) - guided[1] * (s1 - s2) - guided[2] * s2
    found = corrected_run(solver, velocities, fresh, branches="separate")
    np.testing.assert_allclose(found, [retaken], rtol=1e-5)


@pytest.mark.parametrize("branches", ["separate", "shared"])
@pytest.mark.parametrize("make", [solvers.euler, solvers.unipc])
def test_correction_is_the_run_again_token_by_token(make, branches):
    """Any pattern of tokens computed: the run taken again along each branch's own lines."""
    steps, count = 8, 60
    rng, solver = np.random.default_rng(4), make(steps)
    fresh = rng.random((steps, 2, count)) < 0.4
    fresh[0] = True
    if branches == "shared":
        fresh[:, 1] = fresh[:, 0]
    given = rng.normal(size=(steps, 2, count)).astype(np.float32)
    lines = given.copy()
    for place in np.ndindex(2, count):
        at = np.flatnonzero(fresh[:, *place])
        for first, last in zip(at, [*at[1:], steps], strict=True):
            given[first:last, *place] = given[first, *place]
            sigma = solver.sigma[first:last]
            share = 0 if last == steps else (sigma[0] - sigma) / (sigma[0] - solver.sigma[last])
            towards = given[first if last == steps else last, *place]
            lines[first:last, *place] = given[first, *place] * (1 - share) + towards * share
    found = corrected_run(solver, given, fresh, branches=branches)
    guided = lines[:, 1] + GUIDANCE * (lines[:, 0] - lines[:, 1])
    latents, history = jnp.ones(count), solvers.init(jnp.ones(count))
    for index, velocity in enumerate(guided):
        row = jax.tree.map(lambda leaf, i=index: leaf[i], solver)
        latents, history = solvers.step(row, history, latents, jnp.asarray(velocity))
    np.testing.assert_allclose(found, latents, atol=2e-5 * np.abs(latents).max())


@pytest.mark.parametrize(
    "method",
    [Astraea(), pytest.param(Astraea(PUBLISHED), marks=pytest.mark.slow), StepLevel("residual")],
)
def test_a_video_does_not_depend_on_its_batch(method):
    levels = (10, 0, 10, 0) if isinstance(method, StepLevel) else (10, 4, 0, 7)
    both = small_inputs(2, videos=2)
    together = run(method, levels, inputs=both).latents
    for index in (0, 1):
        context = both.context[jnp.array([index, 2 + index])]
        alone = run(method, levels, inputs=type(both)(both.latents[index][None], context))
        np.testing.assert_allclose(together[index], alone.latents[0], atol=1e-5)
    order = jnp.array([1, 0, 3, 2])
    swapped = type(both)(both.latents[::-1], both.context[order])
    mirrored = run(method, levels, inputs=swapped).latents[::-1]
    np.testing.assert_allclose(mirrored, together, atol=1e-5)


def test_guidance_branches_keep_to_themselves():
    # Swapping the branches and mirroring the scale gives the same guided velocity.
    inputs = small_inputs(4)
    swapped = type(inputs)(inputs.latents, inputs.context[::-1])
    levels = (10, 5, 5, 0)
    first = run(Astraea(), levels, inputs=inputs, guidance=2.0).latents
    second = run(Astraea(), levels, inputs=swapped, guidance=-1.0).latents
    np.testing.assert_allclose(first, second, atol=2e-5)


@pytest.mark.core
def test_one_executable_serves_schedules_prompts_seeds_guidance_and_solvers():
    before = loop.dynamic_loop.num_executables
    for seed in range(4):
        rng = np.random.default_rng(seed)
        make = solvers.unipc if seed % 2 else solvers.euler
        run(
            Astraea(SelectionConfig(w_beta=0.123)), random_levels(rng, 5),
            inputs=small_inputs(seed), guidance=1.5 + seed, solver=make(5),
            key=jax.random.key(seed),
        )  # fmt: skip
    assert loop.dynamic_loop.num_executables == before + 1


@pytest.mark.slow
@pytest.mark.core
def test_levels_may_be_traced_in_jitted_code():
    inputs, traces = small_inputs(), []

    @jax.jit
    def total(levels):
        traces.append(1)
        denoised = denoise(
            small_model(), inputs.latents, inputs.context, solver=solvers.unipc(3),
            schedule=levels, method=Astraea(), guidance=GUIDANCE,
        )  # fmt: skip
        return denoised.latents

    for levels in ((10, 5, 0), (10, 1, 10)):
        expected = run(Astraea(), levels).latents
        np.testing.assert_allclose(total(jnp.array(levels, jnp.int8)), expected, atol=1e-5)
    assert len(traces) == 1


@pytest.mark.core
def test_levels_in_any_form_are_one_program():
    inputs, levels = small_inputs(), (10, 5, 0)
    expected = run(Astraea(), levels).latents
    before = loop.dynamic_loop.num_executables
    for form in (list(levels), np.array(levels), jnp.array(levels), np.array(levels, np.uint8)):
        found = denoise(
            small_model(), *inputs, solver=solvers.unipc(3), schedule=form,
            method=in_a_loop(Astraea()), guidance=GUIDANCE,
        )  # fmt: skip
        assert np.array_equal(found.latents, expected)
    assert loop.dynamic_loop.num_executables == before


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("driver", ["dynamic", "static"])
@pytest.mark.parametrize("form", [list, np.array, jnp.array])
@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([0, 12, -3, 10], r"levels must be integers in 0\.\.10, one per step \(4\); level 2 is 12"),
        ([10, 5, 10], r"levels must be .* one per step \(4\); got 3 values"),
        ([5, 10, 10, 10], "the first level must be 10 .* got 5"),
        ([10.0, 5.0, 0.0, 1.0], r"levels must be integers in 0\.\.10, .*; level 1 is 10\.0"),
        ([10, 10, 5, 0], "step-level computes whole steps, .* asks for level 5"),
    ],
)
def test_levels_that_are_known_are_checked(levels, message, form, driver):
    with pytest.raises(Refusal, match=message):
        denoise(
            small_model(), *small_inputs(), solver=solvers.unipc(4), schedule=form(levels),
            method=StepLevel(), guidance=GUIDANCE, driver=driver,
        )  # fmt: skip


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("levels", "driver", "message"),
    [
        ([10, 5, 0], "static", 'driver "static" needs levels that are known'),
        ([10, 5], "dynamic", r"one per step \(3\); got traced int32 of shape \(2,\)"),
        ([10.0, 5.0, 0.0], "dynamic", r"one per step \(3\); got traced float32"),
    ],
)
def test_what_is_known_of_traced_levels_is_checked(levels, driver, message):
    @jax.jit
    def total(levels):
        return denoise(
            small_model(), *small_inputs(), solver=solvers.unipc(3), schedule=levels,
            method=Astraea(), guidance=GUIDANCE, driver=driver,
        ).latents  # fmt: skip

    with pytest.raises(Refusal, match=message):
        total(jnp.array(levels))


def compiled_steps(method):
    """Optimised programs that hold the token cache: the loop, and a static step."""
    inputs, model = small_inputs(), small_model()
    settings = loop.Settings(method, model.geometry(inputs.latents.shape), 2, False)
    solver, key = solvers.unipc(4), jax.random.key(0)
    levels, scale = np.array([10, 5, 0, 3], np.int8), jnp.float32(GUIDANCE)
    dynamic = loop.dynamic_loop.lower(
        model, inputs.latents, inputs.context, solver, levels, scale, key,
        settings=settings,
    ).compile()  # fmt: skip
    prepared, state = loop.start_static(model, inputs.latents, inputs.context, settings=settings)
    row = jax.tree.map(lambda leaf: jnp.asarray(leaf[1]), solver)
    static = {
        level: loop.static_step.lower(
            model, prepared, state, row, *map(jnp.int32, (level, 1, 4)), scale, key,
            settings=settings, mode=method.static_mode(level),
        ).compile()
        for level in (4, 10)
    }  # fmt: skip
    return state.method.cache, {"dynamic": dynamic, **static}


@pytest.mark.parametrize(
    ("name", "traced_level"),
    [
        pytest.param("default", "branch", marks=pytest.mark.slow),
        ("published", "loop"),
        pytest.param("block last computed", "loop", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("fully_optimised")
@pytest.mark.core
def test_no_copy_of_the_cache_and_donated(name, traced_level):
    cache, programs = compiled_steps(Astraea(CONFIGS[name], traced_level))
    shape = ",".join(map(str, cache.out.shape))
    for which, program in programs.items():
        text = program.as_text()
        assert f"f32[{shape}]" in text, "the cache should be in the program"
        if which == "dynamic":
            # At its start a loop may copy one buffer of zeros where two arrays begin as zeros.
            text = text[: text.index("\nENTRY")]
        copies = re.findall(rf"= f32\[{re.escape(shape)}\]\S* copy\(", text)
        assert not copies, f"{which}: {len(copies)} copies of the whole cache"
        if which != "dynamic":
            aliased = program.memory_analysis().alias_size_in_bytes
            assert aliased >= cache.out.nbytes, f"{which}: the cache is not donated"


@pytest.mark.core
def test_the_caller_keeps_the_noise():
    inputs = small_inputs()
    run(Astraea(), (10, 5), driver="static", inputs=inputs)
    assert np.isfinite(np.asarray(inputs.latents)).all()


@pytest.mark.parametrize("driver", ["dynamic", "static"])
def test_progress_reports_every_step(driver):
    seen = []
    run(Astraea(), (10, 5, 0, 5), driver=driver, progress=seen.append)
    assert sorted(seen) == [1, 2, 3, 4]


def test_another_listener_is_no_other_program():
    levels = (10, 5, 0, 5)
    run(Astraea(), levels, progress=lambda done: None)
    before, seen = loop.dynamic_loop.num_executables, []
    run(Astraea(), levels, progress=seen.append)
    assert loop.dynamic_loop.num_executables == before and sorted(seen) == [1, 2, 3, 4]
    assert not progress._listeners


@pytest.mark.parametrize("driver", ["dynamic", "static"])
def test_runs_of_two_threads_each_tell_their_own_listener(driver):
    told, levels = {0: [], 1: []}, (10, 5, 0, 5)

    def work(index):
        for _ in range(3):
            run(Astraea(), levels, driver=driver, progress=told[index].append)

    threads = [threading.Thread(target=work, args=(index,)) for index in told]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == {0: [1, 2, 3, 4] * 3, 1: [1, 2, 3, 4] * 3}
    assert not progress._listeners


def test_overlapping_listeners_keep_apart_and_none_stays():
    first, second = [], []
    one, two = progress.listening(first.append), progress.listening(second.append)
    a, b = one.__enter__(), two.__enter__()
    progress.tell_step(a, np.int32(1))
    one.__exit__(None, None, None)
    progress.tell_step(b, np.int32(2))
    progress.tell_step(a, np.int32(3))  # of a run that has ended
    two.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert (first, second) == ([1], [2]) and not progress._listeners


@pytest.mark.parametrize("driver", ["dynamic", "static"])
@pytest.mark.parametrize("transform", [jax.make_jaxpr, jax.vmap, jax.grad])
def test_progress_inside_another_program_is_refused(driver, transform):
    latents = jnp.broadcast_to(small_inputs().latents, (1, *small_inputs().latents.shape))

    def total(latents):
        latents = latents if latents.ndim == 5 else latents[0]
        inputs = small_inputs()._replace(latents=latents)
        return run(Astraea(), (10, 5), driver=driver, inputs=inputs, progress=print).latents.sum()

    with pytest.raises(Refusal, match=r"progress expects .*outside of jit, vmap and grad"):
        transform(total)(latents)


def over_devices(method, levels, driver, *, context_too=False):
    """`denoise` of a mesh's videos inside a `shard_map` that checks what differs over it."""
    model, inputs, mesh = small_model(), small_inputs(), Mesh(jax.devices()[:1], ("data",))
    whole, split = PartitionSpec(), PartitionSpec("data")

    def local(latents, context):
        mine = type(inputs)(latents, context)
        return run(method, levels, driver=driver, inputs=mine, model=model).latents

    places = (split, split if context_too else whole)
    return jax.shard_map(local, mesh=mesh, in_specs=places, out_specs=split), inputs


FAST = {("astraea", "dynamic"), ("astraea-published", "dynamic"), ("step-level", "static")}
SHARDED = METHODS | {name: Astraea(config) for name, config in CONFIGS.items()}


@pytest.mark.parametrize(
    ("method", "driver"),
    [
        pytest.param(method, driver, id=f"{name}-{driver}", marks=[pytest.mark.slow] * slow)
        for name, method in SHARDED.items()
        for driver in ("dynamic", "static")
        for slow in [(name, driver) not in FAST]
    ],
)
def test_a_checked_shard_map_is_traced(method, driver):
    levels = (10, 0) if isinstance(method, StepLevel) else (10, 5) if method.by_level else (10, 10)
    mapped, inputs = over_devices(method, levels, driver)
    assert jax.eval_shape(mapped, *inputs).shape == inputs.latents.shape


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["dynamic", "static"])
def test_a_checked_shard_map_gives_the_same(driver):
    levels = (10, 4, 0, 7)
    mapped, inputs = over_devices(Astraea(), levels, driver, context_too=True)
    alone = run(Astraea(), levels, driver=driver, inputs=inputs).latents
    np.testing.assert_allclose(jax.jit(mapped)(*inputs), alone, atol=1e-5)


@pytest.mark.parametrize("driver", slow_but({"dynamic"}, ["dynamic", "static"]))
def test_trace_says_what_was_computed(driver):
    levels = (10, 5, 0, 3)
    for config in (SelectionConfig(), CONFIGS["block residual"]):
        trace = run(Astraea(config), levels, driver=driver, trace=True).trace
        shares = np.repeat(np.array(levels)[:, None] / 10, 2, axis=1)
        np.testing.assert_allclose(trace.computed.mean(axis=-1), shares, atol=1e-6)
        assert ((trace.overlap >= 0) & (trace.overlap <= 1)).all()
        if config.scope == "step":
            np.testing.assert_allclose(trace.overlap, 1.0)


@pytest.mark.slow
def test_squared_change_with_output_reuse_degenerates_to_one_selection():
    # specs: a token that is stale in a block enters the next one unchanged, so the next block
    # picks the very tokens that were just computed. This is why scope "step" loses nothing.
    trace = run(Astraea(PUBLISHED), (10, 5, 5, 5, 5), trace=True).trace
    assert float(trace.overlap[2:].min()) > 0.95


def test_stale_tokens_keep_their_velocity_when_asked():
    # One token never computed after the first step: its velocity must stay as it was then.
    kept = Astraea(SelectionConfig(velocity="kept", rank="random", w_beta=0.0))
    inputs, solver = small_inputs(), solvers.euler(2)
    first = run(Dense(), (10,), solver=solvers.Solver(*(leaf[:1] for leaf in solver)))
    both = run(kept, (10, 1), solver=solver, trace=True)
    stale = both.trace.computed[1, 0] == 0
    ratio = solver.sigma[1]
    velocity_first = (inputs.latents - first.latents) / (1 - ratio)
    velocity_second = (first.latents - both.latents) / ratio
    same = np.abs(np.asarray(velocity_first - velocity_second)[0]).max(axis=-1) < 1e-3
    patches = same.reshape(3, 4, 2, 5, 2).all(axis=(2, 4)).reshape(-1)
    assert patches[np.asarray(stale)].all() and not patches[~np.asarray(stale)].any()


@pytest.mark.usefixtures("as_a_user")
def test_bad_input_is_refused_before_anything_runs():
    inputs, model = small_inputs(), small_model()
    call = {"solver": solvers.unipc(3), "guidance": GUIDANCE}
    with pytest.raises(ValueError, match=r"levels must be .*one per step \(3\); got 2 values"):
        denoise(model, inputs.latents, inputs.context, schedule=Schedule((10, 5)), **call)
    with pytest.raises(ValueError, match=r"whole steps, levels 0 and 10.*level 5"):
        denoise(
            model, inputs.latents, inputs.context, schedule=Schedule((10, 5, 0)),
            method=StepLevel(), **call,
        )  # fmt: skip
    with pytest.raises(ValueError, match="expected conditions of 2 rows"):
        denoise(model, inputs.latents, inputs.context[:1], **call)
    with pytest.raises(ValueError, match=r"expected latents \[B,F,H,W,4\]"):
        denoise(model, inputs.latents[..., :3], inputs.context, **call)
    with pytest.raises(ValueError, match="multiples of"):
        denoise(model, inputs.latents[:, :, :7], inputs.context, **call)
    with pytest.raises(ValueError, match='driver must be "dynamic" or "static"'):
        denoise(model, inputs.latents, inputs.context, driver="fast", **call)
    with pytest.raises(ValueError, match='needs scope "step"'):
        FixedToken(dataclasses.replace(PUBLISHED, scope="block"))


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
