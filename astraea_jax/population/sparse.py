"""What one lane does at a step, and ASTRAEA's sparse step of all lanes as one list of tiles."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from astraea_jax import denoise as loop
from astraea_jax.denoise import LoopState, Settings
from astraea_jax.methods import Astraea, base
from astraea_jax.methods.token_wise import Filled, Opened, Run, compute_rows
from astraea_jax.model import VideoDiT
from astraea_jax.schedule import LEVELS
from astraea_jax.solvers import Solver


class Lane(NamedTuple):
    """What one lane does at a step; mapped over lanes, everything here is shared by them."""

    model: VideoDiT
    prepared: Any
    solver: Solver
    guidance: Array
    key: Array
    settings: Settings

    def row(self, index) -> Solver:
        """The solver's coefficients at a step."""
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], self.solver)

    def inputs(self, latents, index, level) -> base.StepInputs:
        """What the method is given."""
        return loop.step_inputs(latents, self.row(index), level, index, self.key, self.settings)

    def forward(self, mode: base.Mode, inputs: base.StepInputs, state) -> base.Forward:
        """The method's forward pass in a mode."""
        return self.settings.method.forward(
            mode, self.model, self.prepared, self.settings.geometry, inputs, state,
            self.settings.num_branches,
        )  # fmt: skip

    def advance(self, state: LoopState, forward: base.Forward, index) -> LoopState:
        """The solver's step."""
        row = self.row(index)
        return loop.advance(self.model, state, forward, row, self.guidance, self.settings)

    def skip(self, state: LoopState, index, mask) -> LoopState:
        """A step at level 0 where `mask` says so."""
        inputs = self.inputs(state.latents, index, 0)
        after = self.advance(state, self.forward(base.SKIP, inputs, state.method), index)

        def choose(new, old):
            # What a skipped step does not touch, the large cache above all, is not copied.
            return old if new is old else jnp.where(mask, new, old)

        return jax.tree.map(choose, after, state)


def sparse_forward(each: Lane, inputs: base.StepInputs, state, *, tiles: int) -> base.Forward:
    """ASTRAEA's step of all lanes, level 10 included.

    Keys and values, and everything else that all tokens need, are computed lane by lane side by
    side; the selected rows as one list of (lane, tenth) tiles.
    """
    model, geometry = each.model, each.settings.geometry
    step = SparseStep(each, inputs, jax.vmap(model.modulation)(inputs.timestep), tiles)
    choices, carries = step.mapped(lambda run, state: run.begin(state, run.inputs.level), state)

    def layer_step(carries, xs):
        layer, layer_index = xs
        for kind in range(len(geometry.groups)):
            index = layer_index * len(geometry.groups) + kind
            carries = step.block(layer, kind, index, choices, carries)
        return carries, None

    numbers = jnp.arange(geometry.num_layers, dtype=jnp.int32)
    carries, _ = lax.scan(layer_step, carries, (model.layers(each.prepared), numbers))
    return step.mapped(Run.finish, carries, state)


@dataclasses.dataclass(frozen=True)
class SparseStep:
    """One sparse step of all lanes.

    Attributes:
      each: what the lanes share.
      inputs: of every lane, as `modulations`.
      modulations: what the timestep does to the blocks.
      tiles: tenths computed at a time.
    """

    each: Lane
    inputs: base.StepInputs
    modulations: Any
    tiles: int

    @property
    def config(self):
        """The selection of the method that the lanes run."""
        assert isinstance(self.each.settings.method, Astraea), self.each.settings.method
        return self.each.settings.method.selection

    def mapped(self, function, *operands):
        """`function` of a lane's `Run` and its operands, for all lanes side by side."""
        each, settings = self.each, self.each.settings

        def one(modulation, inputs, *operands):
            run = Run(
                self.config, each.model, each.prepared, modulation, settings.geometry, inputs,
                settings.num_branches,
            )  # fmt: skip
            return function(run, *operands)

        return jax.vmap(one)(self.modulations, self.inputs, *operands)

    def block(self, layer, kind: int, index, choices, carries):
        """A block of every lane: opened, its selected rows computed, closed."""
        each, groups = self.each, self.each.settings.geometry.groups[kind]

        def open_block(run: Run, carry, choices):
            block = each.model.bind(layer, each.prepared, run.modulation)[kind]
            return run.open_block(carry, block, index, groups, choices, run.inputs.level)

        def close_block(run: Run, opened, filled):
            return run.close_block(opened, filled, index, groups)

        opened = self.mapped(open_block, carries, choices)
        return self.mapped(close_block, opened, self.rows(layer, kind, index, opened))

    def rows(self, layer, kind: int, index, opened: Opened) -> Filled:
        """The selected rows of all lanes, one list of tiles, some of them at a time."""
        each, levels, geometry = self.each, self.inputs.level, self.each.settings.geometry
        ends = jnp.cumsum(levels, dtype=jnp.int32)

        def compute_tile(modulation, rows, indices, keys_values) -> Filled:
            block = each.model.bind(layer, each.prepared, modulation)[kind]
            return compute_rows(self.config, block, rows, indices, keys_values)

        def compute(turn, filled: Filled) -> Filled:
            place = turn * self.tiles + jnp.arange(self.tiles, dtype=jnp.int32)
            lane = jnp.minimum(jnp.searchsorted(ends, place, side="right"), len(levels) - 1)
            tenth = place - (ends[lane] - levels[lane])
            pick = lambda tree: jax.tree.map(lambda leaf: leaf[lane], tree)  # noqa: E731
            indices = _tenths(opened.choice.indices, lane, tenth, place < ends[-1], geometry)
            at = (
                lane[:, None, None],
                jnp.arange(indices.shape[1], dtype=jnp.int32)[None, :, None],
                indices,
            )
            rows = opened.carry.tokens.at[at].get(mode="clip")
            fresh = jax.vmap(compute_tile)(
                pick(self.modulations), rows, indices, pick(opened.keys_values)
            )
            lane, branch, indices = at
            return Filled(
                filled.merged.at[at].set(fresh.merged, mode="drop", unique_indices=True),
                filled.out.at[lane, index, branch, indices].set(
                    fresh.out.astype(filled.out.dtype), mode="drop", unique_indices=True
                ),
                filled.lse.at[at].set(fresh.lse, mode="drop", unique_indices=True),
            )

        return lax.fori_loop(0, -(-ends[-1] // self.tiles), compute, opened.filled)


def _tenths(indices: Int[Array, "W B M"], lane, tenth, used, geometry) -> Int[Array, "V B K"]:
    """The tiles' token positions; those of a tile that is not used lie past the tokens."""
    rows = indices.shape[2] // LEVELS
    columns = tenth[:, None] * rows + jnp.arange(rows, dtype=jnp.int32)[None]
    picked = jax.vmap(lambda lane, columns: indices[lane][:, columns])(
        lane, jnp.clip(columns, 0, indices.shape[2] - 1)
    )
    return jnp.where(used[:, None, None], picked, geometry.num_tokens)
