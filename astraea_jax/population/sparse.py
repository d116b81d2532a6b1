"""What one lane does at a step, and ASTRAEA's sparse step of all lanes as one list of tiles."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from astraea_jax import denoise as loop
from astraea_jax.denoise import LoopState, Settings
from astraea_jax.methods import Astraea, base
from astraea_jax.methods.token_wise import Filled, Run, compute_rows
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
    model, prepared, settings = each.model, each.prepared, each.settings
    geometry = settings.geometry
    kinds = len(geometry.groups)
    modulations = jax.vmap(model.modulation)(inputs.timestep)
    levels = inputs.level

    assert isinstance(settings.method, Astraea), settings.method
    config = settings.method.selection

    def run(modulation, inputs) -> Run:
        branches = settings.num_branches
        return Run(config, model, prepared, modulation, geometry, inputs, branches)

    def begin(modulation, inputs, state):
        return run(modulation, inputs).begin(state, inputs.level)

    wholes, carries = jax.vmap(begin)(modulations, inputs, state)
    ends = jnp.cumsum(levels)

    def layer_step(carries, xs):
        layer, layer_index = xs
        for kind in range(kinds):
            index, groups = layer_index * kinds + kind, geometry.groups[kind]

            def block_of(modulation, kind=kind):
                return model.bind(layer, prepared, modulation)[kind]

            def open_block(m, inputs, carry, whole, index=index, groups=groups, of=block_of):
                level = inputs.level
                return run(m, inputs).open_block(carry, of(m), index, groups, whole, level)

            opened = jax.vmap(open_block)(modulations, inputs, carries, wholes)

            def compute_tile(modulation, rows, indices, keys_values, block_of=block_of):
                block = block_of(modulation)
                return compute_rows(config, block, rows, indices, keys_values)

            def compute(turn, filled: Filled, opened=opened, index=index, tile=compute_tile):
                place = turn * tiles + jnp.arange(tiles)
                lane = jnp.minimum(jnp.searchsorted(ends, place, side="right"), len(levels) - 1)
                tenth = place - (ends[lane] - levels[lane])
                pick = lambda tree: jax.tree.map(lambda leaf: leaf[lane], tree)  # noqa: E731
                indices = _tenths(opened.choice.indices, lane, tenth, place < ends[-1], geometry)
                at = lane[:, None, None], jnp.arange(indices.shape[1])[None, :, None], indices
                rows = opened.carry.tokens.at[at].get(mode="clip")
                fresh = jax.vmap(tile)(pick(modulations), rows, indices, pick(opened.keys_values))
                lane, branch, indices = at
                return Filled(
                    filled.merged.at[at].set(fresh.merged, mode="drop", unique_indices=True),
                    filled.out.at[lane, index, branch, indices].set(
                        fresh.out.astype(filled.out.dtype), mode="drop", unique_indices=True
                    ),
                    filled.lse.at[at].set(fresh.lse, mode="drop", unique_indices=True),
                )

            turns = -(-ends[-1] // tiles)
            filled = lax.fori_loop(0, turns, compute, opened.filled)

            def close_block(modulation, inputs, opened, filled, index=index):
                return run(modulation, inputs).close_block(opened, filled, index)

            carries = jax.vmap(close_block)(modulations, inputs, opened, filled)
        return carries, None

    numbers = jnp.arange(geometry.num_layers, dtype=jnp.int32)
    carries, _ = lax.scan(layer_step, carries, (model.layers(prepared), numbers))

    def finish(modulation, inputs, carry, state):
        return run(modulation, inputs).finish(carry, state)

    return jax.vmap(finish)(modulations, inputs, carries, state)


def _tenths(indices: Int[Array, "W B M"], lane, tenth, used, geometry) -> Int[Array, "V B K"]:
    """The tiles' token positions; those of a tile that is not used lie past the tokens."""
    rows = indices.shape[2] // LEVELS
    columns = tenth[:, None] * rows + jnp.arange(rows)
    picked = jax.vmap(lambda lane, columns: indices[lane][:, columns])(
        lane, jnp.clip(columns, 0, indices.shape[2] - 1)
    )
    return jnp.where(used[:, None, None], picked, geometry.num_tokens)
