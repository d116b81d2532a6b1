"""Many schedules denoised in one program, at the sum of their costs.

Schedules of whole steps run in lanes. At every round each lane takes one computed step, whichever
step that is in its own schedule; the steps it skips cost a solver step. A lane whose schedule is
done takes the next candidate, so a batch takes as many rounds as its computed steps fill, and no
lane waits for another at a step that it skips itself. Others are denoised one after another, in
one program too: laid out as one list of tiles for many lanes, sparse steps were slower than that.

All candidates share the prompts, their text, the noise and the dense start of their schedules.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from astraea_jax import denoise as loop
from astraea_jax import step as stepping
from astraea_jax.denoise import LoopState, Settings
from astraea_jax.methods import Method, base
from astraea_jax.model import VideoDiT
from astraea_jax.schedule import LEVELS
from astraea_jax.solvers import Solver
from astraea_jax.timing import timed_jit

Plan = Literal["lanes", "map"]

AXIS = "candidates"
"""The mesh axis that schedules are spread over."""


class Lane(NamedTuple):
    """What one lane does at a step; mapped over lanes, everything here is shared by them."""

    evaluation: base.Evaluation
    solver: Solver
    guidance: Array
    key: Array
    settings: Settings

    def row(self, index) -> Solver:
        """The solver's coefficients at a step."""
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], self.solver)

    def forward(self, mode: base.Mode, state: LoopState, index, level) -> base.Forward:
        """The method's forward pass in a mode."""
        row = self.row(index)
        inputs = stepping.step_inputs(state.latents, row, level, index, self.key, self.settings)
        return self.settings.method.forward(mode, self.evaluation, inputs, state.method)

    def advance(self, state: LoopState, forward: base.Forward, index) -> LoopState:
        """The solver's step."""
        row = self.row(index)
        return stepping.advance(
            self.evaluation.model, state, forward, row, self.guidance, self.settings
        )

    def compute(self, state: LoopState, index) -> LoopState:
        """A computed step."""
        return self.advance(state, self.forward(base.DENSE, state, index, LEVELS), index)

    def skip(self, state: LoopState, index, mask) -> LoopState:
        """A step at level 0 where `mask` says so."""
        after = self.advance(state, self.forward(base.SKIP, state, index, 0), index)

        def choose(new, old):
            # What a skipped step does not touch is not copied.
            return old if new is old else jnp.where(mask, new, old)

        return jax.tree.map(choose, after, state)


class Lanes(NamedTuple):
    """The candidates that are being denoised, one a lane, and what has been finished.

    Attributes:
      candidate: which schedule a lane runs; P where there is none left.
      index: the step that it is at.
      state: its loop's state, a leading axis of lanes.
      started: schedules taken so far.
      latents: of finished schedules, in the order of the schedules.
    """

    candidate: Int[Array, "W"]
    index: Int[Array, "W"]
    state: LoopState
    started: Int[Array, ""]
    latents: Float[Array, "S P F Y X C"]


@timed_jit(static=("settings", "dense_start", "precision"))
def denoise_start(
    model, latents, conditions, solver, guidance, key, *, settings, dense_start, precision
):
    """What the model prepares, and the state after the dense steps that all schedules share."""
    with jax.default_matmul_precision(precision):
        prepared = model.prepare(conditions, settings.geometry)
        each = _lane(model, prepared, solver, guidance, key, settings)

        def step(state: LoopState, index):
            return each.compute(state, index), None

        indices = jnp.arange(dense_start, dtype=jnp.int32)
        return prepared, lax.scan(step, stepping.start(model, latents, settings), indices)[0]


def _lane(model, prepared, solver: Solver, guidance, key, settings: Settings) -> Lane:
    evaluation = settings.evaluation(model, prepared, jnp.int32(solver.steps))
    return Lane(evaluation, solver, guidance, key, settings)


@timed_jit(static=("settings", "dense_start", "plan", "lanes", "precision", "mesh"))
def denoise_many(
    model: VideoDiT,
    prepared: Any,
    state: LoopState,
    solver: Solver,
    levels: Int[Array, "S T"],
    *,
    guidance: Float[Array, ""],
    key: Key[Array, ""],
    settings: Settings,
    dense_start: int,
    plan: Plan,
    lanes: int,
    precision: str | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "S P F Y X C"]:
    """Denoised latents of every schedule.

    Args:
      model: a video diffusion transformer.
      prepared: of `denoise_start`, as `state`.
      state: the state after the dense start.
      solver: T steps.
      levels: a schedule a row; the first `dense_start` levels are taken as 10.
      guidance: scale of classifier-free guidance; any number without.
      key: for methods that draw.
      settings: static choices, without a trace.
      dense_start: steps that `state` is past.
      plan: "lanes": some at a time, whole steps alone. "map": one schedule after another.
      lanes: schedules denoised at a time.
      precision: of matrix products, as `jax.default_matmul_precision`.
      mesh: devices to spread the schedules over, each with as many; they never talk.
    """
    static = {"settings": settings, "dense_start": dense_start, "plan": plan}
    run = functools.partial(_denoise_many, lanes=lanes, **static)
    if mesh is not None:
        whole, split = PartitionSpec(), PartitionSpec(AXIS)
        places = (whole, whole, whole, whole, split, whole, whole)
        run = jax.shard_map(run, mesh=mesh, in_specs=places, out_specs=split, check_vma=False)
    with jax.default_matmul_precision(precision):
        return run(model, prepared, state, solver, levels, guidance, key)


def _denoise_many(
    model, prepared, state, solver, levels, guidance, key, *, settings, dense_start, plan, lanes
):
    """What one device does with its schedules."""
    each = _lane(model, prepared, solver, guidance, key, settings)
    if plan == "lanes":
        levels = jnp.where(levels >= LEVELS, levels, 0)  # as whole steps are decided
        return Batch.of(each, state, levels, dense_start).denoise(lanes)
    loop_step = loop.loop_step(each.evaluation, guidance, key, settings=settings)
    rows = jax.tree.map(lambda leaf: jnp.asarray(leaf[dense_start:]), solver)
    indices = jnp.arange(dense_start, solver.steps, dtype=jnp.int32)

    def run(row):
        return lax.scan(loop_step, state, (rows, row[dense_start:], indices))[0].latents

    return lax.map(run, levels)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Schedules that are denoised in lanes; what does not change from round to round.

    Attributes:
      each: what a lane does at a step.
      shared: the state after the dense start, where every schedule begins.
      levels: the schedules, and one of zeros for a lane with nothing left to do.
      order: where each schedule was, before the longest came first.
      dense_start: steps that `shared` is past.
    """

    each: Lane
    shared: LoopState
    levels: Int[Array, "R T"]
    order: Int[Array, "S"]
    dense_start: int

    @classmethod
    def of(cls, each: Lane, shared: LoopState, levels, dense_start: int) -> "Batch":
        """The longest first, so that the last rounds are not left to a few lanes."""
        order = jnp.argsort(-(levels[:, dense_start:] > 0).sum(axis=1))
        nothing = jnp.zeros((1, levels.shape[1]), levels.dtype)
        levels = jnp.concatenate([levels[order], nothing])
        return cls(each, shared, levels, order, dense_start)

    def denoise(self, lanes: int) -> Float[Array, "S P F Y X C"]:
        """Latents of every schedule, in so many lanes."""
        first = jnp.arange(lanes, dtype=jnp.int32)
        latents = self.shared.latents
        carry = Lanes(
            candidate=jnp.minimum(first, self.number),
            index=jnp.full((lanes,), self.dense_start, jnp.int32),
            state=jax.tree.map(lambda x: jnp.broadcast_to(x, (lanes, *x.shape)), self.shared),
            started=jnp.minimum(jnp.int32(lanes), self.number),
            latents=jnp.zeros((self.number, *latents.shape), jnp.float32),
        )
        carry = lax.while_loop(
            lambda carry: (carry.candidate < self.number).any(),
            lambda carry: self.settle(self.compute(carry)),
            self.settle(carry),
        )
        return jnp.zeros_like(carry.latents).at[self.order].set(carry.latents)

    @property
    def number(self) -> int:
        """Schedules."""
        return self.levels.shape[0] - 1

    @property
    def steps(self) -> int:
        """Of each schedule."""
        return self.levels.shape[1]

    def settle(self, carry: Lanes) -> Lanes:
        """Until every lane stands before a step that it computes, or has nothing left to do."""

        def unsettled(carry):
            return ((carry.index >= self.steps) & (carry.candidate < self.number)).any()

        return lax.while_loop(
            unsettled, lambda carry: self.skip(self.fill(carry)), self.skip(carry)
        )

    def fill(self, carry: Lanes) -> Lanes:
        """Puts away what is finished, and starts the next schedules in its place."""
        done = carry.index >= self.steps
        place = jnp.where(done & (carry.candidate < self.number), carry.candidate, self.number)
        latents = carry.latents.at[place].set(carry.state.latents, mode="drop")
        rank = jnp.cumsum(done, dtype=jnp.int32) - 1
        following = jnp.minimum(carry.started + rank, self.number)
        candidate = jnp.where(done, following, carry.candidate)
        fresh = done & (candidate < self.number)
        index = jnp.where(fresh, self.dense_start, carry.index)

        def choose(shared, old):
            mask = fresh.reshape(-1, *[1] * (old.ndim - 1))
            return jnp.where(mask, shared[None], old)

        started = jnp.minimum(carry.started + done.sum(dtype=jnp.int32), self.number)
        refilled = jax.tree.map(choose, self.shared, carry.state)
        return Lanes(candidate, index, refilled, started, latents)

    def skip(self, carry: Lanes) -> Lanes:
        """Moves every lane past the steps that it skips."""

        def waiting(carry):
            level = self.levels[carry.candidate, jnp.minimum(carry.index, self.steps - 1)]
            return (carry.index < self.steps) & (carry.candidate < self.number) & (level == 0)

        def once(carry):
            mask, at = waiting(carry), jnp.minimum(carry.index, self.steps - 1)
            state = jax.vmap(self.each.skip)(carry.state, at, mask)
            return carry._replace(index=carry.index + mask.astype(jnp.int32), state=state)

        return lax.while_loop(lambda carry: waiting(carry).any(), once, carry)

    def compute(self, carry: Lanes) -> Lanes:
        """One computed step of every lane."""
        active = carry.candidate < self.number
        at = jnp.minimum(carry.index, self.steps - 1)
        state = jax.vmap(self.each.compute)(carry.state, at)
        # A lane with nothing left to do repeats its last step, which nobody reads.
        return carry._replace(index=carry.index + active.astype(jnp.int32), state=state)


def can_run_in_lanes(method: Method) -> bool:
    """Whether "lanes" gives what the method's own `decide` gives: whole steps, by their level."""
    return method.by_level and method.modes == (base.SKIP, base.DENSE)
