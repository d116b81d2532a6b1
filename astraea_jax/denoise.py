"""The denoising loop: latents of noise in, latents of a video out, a cache carried between steps.

Two drivers give the same numbers. "dynamic" is one jitted scan whose levels are data, so that one
program serves every schedule; it may be called from jitted code. "static" is a host loop over one
jitted, donated step for each level that the schedule uses, with big tiles.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Integer, Key

from astraea_jax import checks, solvers
from astraea_jax.checks import Refusal
from astraea_jax.methods import base
from astraea_jax.methods.base import Evaluation, Method, Trace, seeded
from astraea_jax.methods.dense import Dense
from astraea_jax.model import Conditions, Prepared, VideoDiT
from astraea_jax.progress import listening, tell_step
from astraea_jax.schedule import LEVELS, Schedule, check_levels
from astraea_jax.solvers import Solver
from astraea_jax.step import LoopState, Settings, advance, decided, forward_in, start, step_inputs
from astraea_jax.timing import timed_jit, tracing

Driver = Literal["dynamic", "static"]


class Denoised(NamedTuple):
    """What a run gives.

    Attributes:
      latents: denoised, normalised as the VAE expects, float32.
      trace: of every step (leading axis T), or () when it was not asked for.
    """

    latents: Float[Array, "P F Y X C"]
    trace: Trace | tuple[()]


def denoise(
    model: VideoDiT,
    latents: Float[Array, "P F Y X C"],
    conditions: Conditions,
    *,
    solver: Solver,
    schedule: Schedule | Sequence[int] | Integer[Array, "T"] | np.ndarray | None = None,
    method: Method | None = None,
    guidance: float | Float[Array, ""] | None = None,
    key: Key[Array, ""] | None = None,
    driver: Driver = "dynamic",
    progress: Callable[[int], None] | None = None,
    trace: bool = False,
) -> Denoised:
    """Denoises latents.

    Args:
      model: a video diffusion transformer.
      latents: Gaussian noise, one video a row.
      conditions: what the model takes beside noise, a row for each video; for Wan text embeddings
        [B, M, D], padded to the model's text length. With guidance the P conditional rows first,
        then the P unconditional ones.
      solver: of `solvers.unipc` or `solvers.euler`, T steps.
      schedule: a level for each step; None is dense. A list, tuple or array of levels 0..10 (its
        first 10) does too, and with the dynamic driver may be traced: it is then not checked.
      method: None is the plain model.
      guidance: scale of classifier-free guidance, or None for none. Each branch has a cache.
      key: for methods that draw; None is key 0.
      driver: "dynamic" or "static".
      progress: called with the number of finished steps, 1..T, after each; not from a program of
        which the run is a part.
      trace: whether to return which tokens were computed.

    Returns:
      The denoised latents, and the trace.

    Raises:
      Refusal: shapes, schedule and solver that do not fit, or levels that the method can't do,
        before anything is computed.
    """
    method = Dense() if method is None else method
    solver = solvers.check(solver)
    settings = check(model, latents, conditions, method, guidance, key, trace)
    if progress is not None and not callable(progress):
        raise Refusal(f"progress must be a function or None; got {checks.shown(progress)}")
    if driver not in ("dynamic", "static"):
        raise Refusal(f'driver must be "dynamic" or "static"; got {checks.shown(driver)}')
    if progress is not None and tracing():
        raise Refusal(
            "progress expects to be called while this call runs; got a call that is traced, as a "
            "part of a program that runs later, or many times: leave progress out, or call "
            "denoise outside of jit, vmap and grad"
        )
    levels = _levels(schedule, solver, method, driver)
    key = seeded(0) if key is None else key
    scale = _as_float32(1.0 if guidance is None else guidance)
    latents, conditions = _as_float32(latents), _placed(conditions)
    if driver == "static":
        return _static(model, latents, conditions, solver, levels, scale, key, settings, progress)
    solver, levels = _placed((solver, levels))
    run = functools.partial(
        dynamic_loop, model, latents, conditions, solver, levels, scale, key, settings=settings
    )
    if progress is None:
        return run()
    with listening(progress) as listener:
        denoised = jax.block_until_ready(run(listener=_placed(listener)))
        jax.effects_barrier()
    return denoised


@timed_jit(static=("settings",))
def dynamic_loop(
    model, latents, conditions, solver, levels, guidance, key, *, settings, listener=None
):
    """The whole loop as one program; levels, solver, guidance, key and listener are data."""
    prepared = model.prepare(conditions, settings.geometry)
    evaluation = settings.evaluation(model, prepared, jnp.int32(solver.steps))
    step = loop_step(evaluation, guidance, key, settings=settings, listener=listener)
    indices = jnp.arange(solver.steps, dtype=jnp.int32)
    state = start(model, latents, settings, (prepared, solver, levels, guidance, key))
    state, traces = lax.scan(step, state, (solver, jnp.asarray(levels), indices))
    return Denoised(state.latents, traces)


def loop_step(evaluation: Evaluation, guidance, key, *, settings: Settings, listener=None):
    """The body of a scan over (solver row, level, index of the step), level being data.

    `listener` is the number under which `progress.listening` keeps whom to tell; None tells nobody.
    """

    def step(state: LoopState, xs):
        solver_row, level, index = xs
        inputs = step_inputs(state.latents, solver_row, level, index, key, settings)
        forward = decided(evaluation, inputs, state, settings)
        state = advance(evaluation.model, state, forward, solver_row, guidance, settings)
        if listener is not None:
            jax.debug.callback(tell_step, listener, index + 1, ordered=False)
        return state, forward.trace if settings.trace else ()

    return step


def _static(model, latents, conditions, solver, levels, guidance, key, settings, progress):
    """A host loop over compiled steps, one for each mode that the method plans.

    Where it plans none, there is one program, which decides as it runs.
    """
    levels = [int(level) for level in jax.device_get(levels)]
    modes = settings.method.plan(levels, solver) or [None] * len(levels)
    prepared, state = start_static(model, latents, conditions, settings=settings)
    traces = []
    # Cut on the host and sent at once: a small model's step is shorter than to cut on a device.
    table = jax.device_get(solver)
    numbers = [
        (jax.tree.map(lambda leaf, i=index: leaf[i], table), *map(np.int32, (level, index)))
        for index, level in enumerate(levels)
    ]
    steps = _placed(np.int32(len(levels)))
    for index, (mode, number) in enumerate(zip(modes, _placed(numbers), strict=True)):
        state, step_trace = static_step(
            model, prepared, state, *number, steps, guidance, key, settings=settings, mode=mode
        )
        traces.append(step_trace)
        if progress is not None:
            jax.block_until_ready(state.latents)
            progress(index + 1)
    trace = jax.tree.map(lambda *leaves: jnp.stack(leaves), *traces) if settings.trace else ()
    return Denoised(state.latents, trace)


@timed_jit(static=("settings",))
def start_static(model, latents, conditions, *, settings) -> tuple[Prepared, LoopState]:
    """What the static driver starts from."""
    prepared = model.prepare(conditions, settings.geometry)
    return prepared, start(model, latents, settings, prepared)


@timed_jit(static=("settings", "mode"), donate=("state",))
def static_step(
    model, prepared, state: LoopState, solver_row, level, index, steps, guidance, key, *,
    settings, mode,
) -> tuple[LoopState, Trace | tuple[()]]:  # fmt: skip
    """One of so many steps; the state is donated, so the cache is updated in place.

    Its mode is static, or None: the method decides as it runs.
    """
    evaluation = settings.evaluation(model, prepared, steps)
    inputs = step_inputs(state.latents, solver_row, level, index, key, settings)
    if mode is None:
        forward = decided(evaluation, inputs, state, settings)
    else:
        forward = forward_in(evaluation, mode, settings, inputs, state.method)
    state = advance(model, state, forward, solver_row, guidance, settings)
    return state, forward.trace if settings.trace else ()


LARGEST_GUIDANCE = 1e4
"""Either way; models are made for about 5."""


def check(model, latents, conditions, method, guidance, key, trace) -> Settings:
    """Refuses what does not fit, before anything is traced."""
    if isinstance(model, type) or not isinstance(model, VideoDiT):
        raise Refusal(f"model must be a video diffusion transformer; got {checks.shown(model)}")
    method = base.check(method)
    if not jnp.issubdtype(checks.array("latents", latents, "[P,F,Y,X,C]").dtype, jnp.floating):
        raise Refusal(f"latents must be an array of floats [P,F,Y,X,C]; got {latents.dtype}")
    if isinstance(guidance, jax.Array | np.ndarray):
        if guidance.shape != ():
            raise Refusal(f"guidance must be one number; got an array of shape {guidance.shape}")
    elif guidance is not None:
        checks.number("guidance", guidance, -LARGEST_GUIDANCE, LARGEST_GUIDANCE)
    if key is not None and not _is_key(key):
        raise Refusal(f"key must be one of jax.random.key(seed); got {checks.shown(key)}")
    checks.flag("trace", trace)
    geometry = model.geometry(latents.shape)
    method.check(geometry)
    branches = 1 if guidance is None else 2
    rows = branches * latents.shape[0]
    for path, leaf in jax.tree.flatten_with_path(conditions)[0]:
        name = f"conditions{jax.tree_util.keystr(path)}"
        shape = checks.array(name, leaf, "with an axis of rows").shape
        if shape[:1] != (rows,):
            raise Refusal(
                f"expected {name} of {rows} rows ({branches} guidance branches of "
                f"{latents.shape[0]} videos); got shape {tuple(shape)}"
            )
    return Settings(method, geometry, branches, trace)


def _is_key(key) -> bool:
    """Whether it is a key, or one of JAX's older kind: an array of words."""
    if not isinstance(key, jax.Array):
        return False
    typed = key.ndim == 0 and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return typed or (key.ndim == 1 and jnp.issubdtype(key.dtype, jnp.unsignedinteger))


def _levels(schedule, solver: Solver, method: Method, driver: Driver):
    """The schedule as data, int8 [T]; as it is where it is traced."""
    if isinstance(schedule, jax.core.Tracer):
        if driver == "static":
            raise Refusal(
                'driver "static" needs levels that are known; use "dynamic" in jitted code'
            )
        if schedule.shape != (solver.steps,) or not jnp.issubdtype(schedule.dtype, jnp.integer):
            raise Refusal(
                f"levels must be integers in 0..{LEVELS}, one per step ({solver.steps}); "
                f"got traced {schedule.dtype} of shape {schedule.shape}"
            )
        return schedule
    if isinstance(schedule, jax.Array):
        schedule = jax.device_get(schedule)
    return np.asarray(known_levels(schedule, solver.steps, method), np.int8)


def known_levels(schedule, steps: int, method: Method, *, dense_start: int = 1) -> tuple[int, ...]:
    """Levels that are known (None is dense), refused where they are none or the method's none."""
    if schedule is None:
        schedule = (LEVELS,) * steps
    levels = check_levels(schedule, steps=steps, dense_start=dense_start)
    method.check_levels(levels)
    return levels


def _placed(tree):
    """Numbers of the host's sent to the device by name, as a transfer guard asks."""
    return tree if tracing() else jax.device_put(tree)


def _as_float32(values) -> Any:
    """Values as a float32 array of the device's."""
    if isinstance(values, jax.Array):
        return values.astype(jnp.float32)
    return _placed(np.asarray(values, np.float32))
