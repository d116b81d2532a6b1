"""What holds of every method on models of every shape; the rules of those that plan themselves."""

import functools
import itertools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import slow_but, small_inputs, small_model
from other_models import grouped_inputs, two_stack_inputs

from astraea_jax import denoise as loop
from astraea_jax import flops, solvers
from astraea_jax.checks import Refusal
from astraea_jax.denoise import denoise
from astraea_jax.flops import BlockSizes, Workload
from astraea_jax.methods import PAB, Astraea, Dense, StepLevel, TeaCache, base
from astraea_jax.model import Geometry
from astraea_jax.selection import PUBLISHED

GUIDANCE = 3.0
STEPS = 6
PERIODS = (("self", 2), ("mlp", 3), ("single.fused", 3))
FULL = {
    "astraea": Astraea(traced_level="loop"),
    "published": Astraea(PUBLISHED, traced_level="loop"),
    "step-level": StepLevel("residual"),
    "pab": PAB((("self", 1), ("fused", 1)), untouched=0.0),
    "teacache": TeaCache(1e-9, (1.0, 0.0), "embedding", first=1),
}
"""Methods so set that all is computed at level 10."""


def run(method, model, inputs, levels=(10,) * STEPS, **options):
    return denoise(
        model, *inputs, solver=solvers.unipc(len(levels)), schedule=levels, method=method,
        guidance=GUIDANCE, **options,
    )  # fmt: skip


@pytest.fixture(params=slow_but({"static"}, ["dynamic", "static"]))
def driver(request):
    return request.param


@functools.cache
def plain(driver):
    return np.asarray(run(Dense(), *two_stack_inputs(), levels=(10,) * 3, driver=driver).latents)


@pytest.mark.core
@pytest.mark.parametrize("name", slow_but({"astraea", "pab"}, FULL))
def test_all_of_it_on_a_model_of_two_stacks_is_the_dense_model(name, driver):
    model, inputs = two_stack_inputs()
    found = run(FULL[name], model, inputs, levels=(10,) * 3, driver=driver)
    assert np.array_equal(found.latents, plain(driver))


def workload(geometry: Geometry) -> Workload:
    """Sizes of a test's model; any feed-forward and text do."""
    return Workload(
        geometry.num_tokens,
        geometry.width,
        tuple(
            BlockSizes(
                number=stack.layers,
                ffn_width=2 * geometry.width,
                text_tokens=6,
                keys=geometry.num_tokens // kind.groups.number,
                groups=kind.groups.number,
                name=kind.name,
                parts=kind.parts,
            )
            for stack in geometry.stacks
            for kind in stack.kinds
        ),
    )


BOOKED = {
    "dense": (Dense(), (10,) * STEPS),
    "astraea": (Astraea(), (10, 5, 0, 3, 10, 8)),
    "block": (Astraea(PUBLISHED), (10, 5, 0, 3, 10, 8)),
    "step-level": (StepLevel(), (10, 0, 10, 0, 0, 10)),
    "pab": (PAB(PERIODS, untouched=0.0), (10,) * STEPS),
    "teacache": (TeaCache(0.23, (1.0, 0.0), "embedding", first=2), (10,) * STEPS),
}


@pytest.mark.parametrize("name", slow_but({"pab"}, BOOKED))
def test_what_is_booked_is_what_was_computed(name):
    method, levels = BOOKED[name]
    model, inputs = two_stack_inputs()
    made = run(method, model, inputs, levels, driver="static", trace=True)
    sizes = workload(model.geometry(inputs.latents.shape))
    solver = solvers.unipc(len(levels))
    modes = method.plan(levels, solver)
    if modes is None:  # decided as it ran, as a plain loop decides
        ran = teacache_rule(method, solver.timestep / 1000)
        modes = [base.DENSE if each else base.SKIP for each in ran]
    booked = [method.work(mode, sizes) for mode in modes]
    np.testing.assert_allclose(flops.traced_flops(sizes, made.trace), booked, rtol=1e-6)
    assert len(set(booked)) > 1 or name == "dense"


def teacache_rule(method: TeaCache, signal) -> list[bool]:
    """The released loop, of a signal that is a number a step."""
    ran, moved, before = [], 0.0, None
    for step, now in enumerate(np.float32(signal)):
        if step < method.first or step >= len(signal) - method.last:
            moved, run_now = 0.0, True
        else:
            moved += float(np.polyval(method.coefficients, abs(now - before) / abs(before)))
            run_now = moved >= method.threshold
            moved = 0.0 if run_now else moved
        before = now
        ran.append(run_now)
    return ran


@pytest.mark.core
@pytest.mark.parametrize("threshold", slow_but({0.3}, [0.05, 0.3]))
def test_teacache_runs_the_steps_of_the_released_rule(threshold, driver):
    method = TeaCache(threshold, (0.5, 1.0, 0.0), "embedding", first=2, last=1)
    model, inputs = two_stack_inputs()
    steps = 12
    made = run(method, model, inputs, (10,) * steps, driver=driver, trace=True)
    ran = np.asarray(made.trace.computed).mean(axis=(1, 2)) > 0
    assert ran.tolist() == teacache_rule(method, solvers.unipc(steps).timestep / 1000)
    assert 2 < ran.sum() < steps


@pytest.mark.core
def test_teacache_reads_the_time_of_wan(driver):
    """Wan's projected embedding, against the rule on the embeddings themselves."""
    model, inputs = small_model(), small_inputs()
    method = TeaCache(2.0, (1.0, 0.0), "projected", first=1)
    made = run(method, model, inputs, (10,) * 8, driver=driver, trace=True)
    ran = np.asarray(made.trace.computed).mean(axis=(1, 2)) > 0
    signals = [
        np.asarray(model.signals(model.time(jnp.full(1, time)))["projected"][0])
        for time in solvers.unipc(8).timestep
    ]
    moved, expected = 0.0, [True]
    for before, now in itertools.pairwise(signals):
        moved += np.abs(now - before).mean() / np.abs(before).mean()
        expected.append(bool(moved >= method.threshold))
        moved = 0.0 if expected[-1] else moved
    assert ran.tolist() == expected and 1 < ran.sum() < 8


def computed_steps(method: PAB, part: str, steps: int) -> list[int]:
    modes = method.plan((10,) * steps, solvers.unipc(steps))
    return [step for step, mode in enumerate(modes) if part not in mode.reused]


@pytest.mark.parametrize(
    ("steps", "counts"),
    [
        (30, {2: 20, 4: 15, 5: 14, 6: 14, 7: 13, 9: 12}),
        (50, {2: 33, 4: 25, 5: 23, 6: 21, 7: 20, 9: 20}),
    ],
)
def test_pab_computes_the_steps_that_are_published(steps, counts):
    for period, count in counts.items():
        assert len(computed_steps(PAB((("self", period),)), "self", steps)) == count
    inside = [
        s for s in range(steps) if s not in computed_steps(PAB((("self", 1000),)), "self", steps)
    ]
    first = math.ceil(0.15 * steps)
    assert inside == list(range(first, steps - first))


def test_pab_by_timesteps():
    solver = solvers.unipc(30, shift=3.0)
    method = PAB((("self", 2), ("cross", 4)), window=(450, 930))
    for step, mode in enumerate(method.plan((10,) * 30, solver)):
        within = 450 < solver.timestep[step] < 930
        expected = [p for p, n in (("self", 2), ("cross", 4)) if step % n and within]
        assert list(mode.reused) == expected


@pytest.mark.slow
@pytest.mark.core
@pytest.mark.parametrize(
    "method",
    [PAB(PERIODS, untouched=0.1), PAB(PERIODS, window=(200, 990))],
    ids=["steps", "timesteps"],
)
def test_pab_decides_as_it_plans(method):
    model, inputs = two_stack_inputs()
    levels = (10,) * 8
    static = run(method, model, inputs, levels, driver="static", trace=True)
    dynamic = run(method, model, inputs, levels, driver="dynamic", trace=True)
    for part, shares in static.trace.parts.items():
        assert np.array_equal(shares, dynamic.trace.parts[part])
    np.testing.assert_allclose(static.latents, dynamic.latents, atol=1e-5)
    dense = run(Dense(), model, inputs, levels).latents
    assert np.abs(np.asarray(dense - static.latents)).max() > 1e-4


@pytest.mark.slow
def test_pab_adds_what_a_part_gave():
    """Two steps of the small Wan by hand: the second has the first's cross-attention."""
    model, inputs = small_model(), small_inputs()
    method = PAB((("cross", 2),), untouched=0.0)
    got = run(method, model, inputs, (10, 10)).latents
    geometry = model.geometry(inputs.latents.shape)
    settings, solver = loop.Settings(Dense(), geometry, 2, False), solvers.unipc(2)
    prepared = model.prepare(inputs.context, geometry)
    outs: dict[int, jax.Array] = {}

    @functools.partial(jax.jit, static_argnums=2)
    def velocity(latents, time, reuse, kept):
        from astraea_jax import model as core

        modulation = model.modulation(jnp.full(2, time), prepared)
        tokens, side = model.embed(jnp.concatenate([latents] * 2), prepared)
        made = {}
        for index in range(2):
            layer = jax.tree.map(lambda leaf, i=index: leaf[i], model.layers(0, prepared))
            (block,) = model.bind(0, layer, prepared, modulation)
            shared, side = block.shared(core.Rows(tokens), side)
            known = {"cross": kept[index]} if reuse else None
            out = core.apply_block(block, core.Rows(tokens), shared, known=known)
            tokens, made[index] = out.rows, out.outs["cross"]
        return base.Forward(model.head(tokens, modulation), (), ()), made

    state = loop.start(model, inputs.latents, settings)._replace(method=())
    for step in range(2):
        row = jax.tree.map(lambda leaf, i=step: jnp.asarray(leaf[i]), solver)
        forward, made = velocity(state.latents, row.timestep, step == 1, outs)
        outs = outs or made
        state = loop.advance(model, state, forward, row, jnp.float32(GUIDANCE), settings)
    np.testing.assert_allclose(got, state.latents, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (PAB((("cross", 6),)), "reuses 'cross', which this model has not; it has double.mlp"),
        (PAB((("spatial.self", 2),)), "reuses 'spatial.self', which this model has not"),
    ],
)
def test_what_a_model_has_not_is_refused_by_name(method, message):
    model, inputs = two_stack_inputs()
    with pytest.raises(Refusal, match=message):
        run(method, model, inputs)


def test_a_signal_that_a_model_has_not_is_refused_by_name():
    with pytest.raises(Refusal, match="compares the signal 'projected', which this model has not"):
        run(TeaCache(), *grouped_inputs())


@pytest.mark.parametrize("method", [PAB((("self", 2),)), TeaCache(signal="embedding")])
def test_a_method_with_a_rule_of_its_own_takes_no_schedule(method):
    model, inputs = two_stack_inputs()
    with pytest.raises(Refusal, match="what its own rule says; the schedule asks for level 0"):
        run(method, model, inputs, (10, 0, 10))


@pytest.mark.parametrize(
    "make",
    [
        lambda: PAB((("self", 0),)),
        lambda: PAB(untouched=0.6),
        lambda: TeaCache(0.0),
        lambda: TeaCache(first=0),
        lambda: TeaCache(coefficients=(math.nan,)),
        lambda: TeaCache(signal="input"),
    ],
)
def test_settings_out_of_range_are_refused(make, as_a_user):
    with pytest.raises(Refusal, match="must be"):
        make()


@pytest.mark.core
def test_kinds_of_their_own_have_periods_of_their_own(driver):
    model, inputs = grouped_inputs()
    method = PAB((("spatial.self", 2), ("temporal.self", 3), ("cross", 2)), untouched=0.0)
    made = run(method, model, inputs, (10,) * 6, driver=driver, trace=True)
    # Half of the blocks are spatial: at step 2 the temporal ones reuse, at step 3 the spatial ones.
    assert np.asarray(made.trace.parts["self"]).tolist() == [1, 0, 0.5, 0.5, 0.5, 0]
    assert np.asarray(made.trace.parts["mlp"]).tolist() == [1] * 6


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
