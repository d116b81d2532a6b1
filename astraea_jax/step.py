"""One step of the denoising loop: what goes from step to step, and what a step does with it."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from astraea_jax import solvers
from astraea_jax.methods.base import Evaluation, Method, Mode, StepInputs, fold
from astraea_jax.model import Geometry, Prepared, VideoDiT
from astraea_jax.solvers import SolverState


class LoopState(NamedTuple):
    """What goes from step to step: a pytree of fixed shapes.

    Attributes:
      latents: the sample at this step's noise level, float32.
      solver: the solver's history.
      method: the method's state (the token cache, last velocity, ...), a row for each guidance
        branch and prompt, branch first.
      gap: what is known of reused velocities, where the method asks that they be corrected.
    """

    latents: Float[Array, "P F Y X C"]
    solver: SolverState
    method: object
    gap: solvers.Gap | tuple[()] = ()


class Settings(NamedTuple):
    """Static choices of a run; hashable."""

    method: Method
    geometry: Geometry
    num_branches: int
    trace: bool

    @property
    def apart(self) -> bool:
        """Whether a token's velocity may be computed in one guidance branch and not in another."""
        return self.num_branches > 1 and not self.method.fresh_alike

    def evaluation(self, model: VideoDiT, prepared: Prepared, steps: Array) -> Evaluation:
        """What the steps of a run share."""
        return Evaluation(model, prepared, self.geometry, self.num_branches, steps)


def start(model, latents, settings: Settings, others=()) -> LoopState:
    """The state before the first step; `others` is what the steps are given beside it."""
    batch = latents.shape[0] * settings.num_branches
    # A copy, because the state is donated and the caller keeps the noise.
    latents = jnp.array(latents, copy=True)
    method_state = settings.method.init(settings.geometry, batch, model.cache_dtype)
    parts = settings.num_branches if settings.apart else 1
    gap = solvers.no_gap(latents, parts) if settings.method.corrects else ()
    state = LoopState(latents, solvers.init(latents), method_state, gap)
    return _varying(state, _varying_axes((model, latents, others)))


def step_inputs(latents, solver_row, level, index, key, settings: Settings) -> StepInputs:
    """What a method's forward pass is given: the latents once for each guidance branch."""
    repeated = jnp.concatenate([latents] * settings.num_branches)
    timestep = jnp.full((repeated.shape[0],), solver_row.timestep, jnp.float32)
    level, index = jnp.asarray(level, jnp.int32), jnp.asarray(index, jnp.int32)
    return StepInputs(repeated, timestep, level, index, fold(key, index))


def forward_in(evaluation: Evaluation, mode: Mode, settings: Settings, inputs, state):
    """The method's forward pass in a mode that is known."""
    return settings.method.forward(mode, evaluation, inputs, state)


def _nothing(forward, *operands):
    """Zeros in the shape of what `forward` gives."""
    shapes = jax.eval_shape(forward, *operands)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def advance(model, state, forward, solver_row, guidance, settings: Settings) -> LoopState:
    """Guides the branches' velocities and takes the solver's step."""
    # Methods that keep the velocity write it to memory; the barrier makes all of them do so, or the
    # guidance would be fused with the head here and not there, and differ in the last bit.
    velocity = lax.optimization_barrier(forward.velocity)
    velocity = model.unpatchify(velocity, settings.geometry)
    branches = jnp.split(velocity, settings.num_branches)
    if len(branches) == 2:
        conditional, unconditional = branches
        velocity = unconditional + guidance * (conditional - unconditional)
    latents, history, gap = state.latents, state.solver, state.gap
    if settings.method.corrects:
        # The guided velocity is a sum of the branches': what each adds to the gap is its share.
        parts, shares = velocity[None], (1.0,)
        if settings.apart:
            parts, shares = jnp.stack(branches), (guidance, 1 - guidance)
        latents, history, gap = solvers.close_gap(
            gap, history, latents, parts, _fresh(model, forward, settings),
            jnp.asarray(solver_row.sigma), shares=shares,
        )  # fmt: skip
        latents, history = lax.optimization_barrier((latents, history))
        gap = solvers.widen_gap(solver_row, gap)
    latents, history = solvers.step(solver_row, history, latents, velocity)
    return LoopState(latents, history, forward.state, gap)


def _fresh(model, forward, settings: Settings):
    """Which latents' velocities were computed at this step: in each branch, where these differ."""
    patches = (*forward.velocity.shape[:2], settings.geometry.patch_values)
    fresh = jnp.broadcast_to(forward.fresh[..., None].astype(jnp.float32), patches)
    fresh = model.unpatchify(fresh, settings.geometry)
    branches = jnp.stack(jnp.split(fresh, settings.num_branches)) > 0
    return branches if settings.apart else branches[:1]


def decided(evaluation: Evaluation, inputs: StepInputs, state: LoopState, settings: Settings):
    """The forward pass in the mode that the method decides on as it runs."""
    method = settings.method
    choice, method_state = method.decide(evaluation, inputs, state.method)
    runs = [functools.partial(forward_in, evaluation, mode, settings) for mode in method.modes]
    if len(runs) == 1:
        # Every step is a branch of a conditional, also where there is no choice: XLA would fuse
        # a bare forward pass with the loop, and its last bits would not be those of a branch.
        runs.insert(0, functools.partial(_nothing, runs[0]))
        choice = (inputs.level >= 0).astype(jnp.int32)
    runs = [functools.partial(_alike, run, _varying_axes(state)) for run in runs]
    return lax.switch(choice, runs, inputs, method_state)


def _varying_axes(tree) -> frozenset[str]:
    """Axes of a mesh that any leaf differs over, inside a `shard_map` that checks it."""
    types = (jax.typeof(leaf).manual_axis_type for leaf in jax.tree.leaves(tree))
    return frozenset[str]().union(*(each.varying for each in types))


def _varying(tree, axes: frozenset[str]):
    """The same numbers, typed as if all of them differed over the axes: what a loop carries."""

    def cast(leaf):
        missing = axes - jax.typeof(leaf).manual_axis_type.varying
        return lax.pcast(leaf, tuple(sorted(missing)), to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def _alike(forward, axes: frozenset[str], *operands):
    """`forward` with results that differ over the same axes, whichever mode it runs."""
    return _varying(forward(*operands), axes)
