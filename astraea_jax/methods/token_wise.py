"""One evaluation of a model with some of its tokens computed: what `astraea.Astraea` runs."""

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from astraea_jax import cache as token_cache
from astraea_jax import entry, selection
from astraea_jax import model as core
from astraea_jax.attention import gather_rows, scatter_rows
from astraea_jax.cache import TokenCache
from astraea_jax.methods import base, blocks
from astraea_jax.methods.blocks import Place
from astraea_jax.methods.token_choice import Choice, Choosing, older
from astraea_jax.model import Rows, Shared, Side
from astraea_jax.selection import SelectionConfig

FEW_ROWS = 1024
"""Rows below which eight more would be a cost."""


class AstraeaState(NamedTuple):
    """The token cache and the last velocity, which a step at level 0 reuses whole."""

    cache: TokenCache
    velocity: Float[Array, "B N P"]


class Carry(NamedTuple):
    """What goes from block to block within a sparse step.

    Attributes:
      tokens: entering the block.
      side: tokens beside the video's.
      before: what entered it a step earlier, where that is known without a slot of its own.
      cache: the token cache.
      previous: the selection of the block before.
      computed: blocks so far that computed each token.
      overlap: sum of the overlaps of consecutive selections so far.
    """

    tokens: Float[Array, "B N H"]
    side: Side
    before: Float[Array, "B N W"]
    cache: TokenCache
    previous: Bool[Array, "B N"]
    computed: Float[Array, "B N"]
    overlap: Float[Array, "B"]


class FreshRows(NamedTuple):
    """What a block made of the selected rows.

    Attributes:
      rows: that leave the block.
      cached: what the cache is to hold of them.
      lse: one log-sum-exp a row.
    """

    rows: Float[Array, "B K H"]
    cached: Float[Array, "B K H"]
    lse: Float[Array, "B K"]


class Destination(NamedTuple):
    """What fresh rows are written to.

    Attributes:
      tokens: that leave the block: stale ones from the start, fresh ones once written.
      stack: the cache's large array, of all blocks.
      lse: one log-sum-exp a token.
    """

    tokens: Float[Array, "B N H"]
    stack: Float[Array, "L B N H"]
    lse: Float[Array, "B N"]


class Opened(NamedTuple):
    """A block before its rows are computed.

    Attributes:
      carry: what entered the block, its reference brought up to date, its side tokens moved on.
      choice: which rows to compute.
      shared: of all tokens.
      before: what entered the next block a step earlier; see `Carry`.
      onto: what the rows are written to.
    """

    carry: Carry
    choice: Choice
    shared: Shared
    before: Float[Array, "B N W"]
    onto: Destination


def compute_rows(config: SelectionConfig, block, rows: Rows, shared: Shared) -> FreshRows:
    """A block on some of its rows."""
    out = core.apply_block(block, rows, shared)
    fresh = cached = out.rows
    if config.reuse == "residual":
        # Both are made in one pass, where the rows were: else XLA keeps those aside in each block.
        fresh, cached = lax.optimization_barrier((fresh, fresh - rows.values))
    assert out.lse is not None, "a selection weighs tokens by their attention"
    return FreshRows(fresh, cached, selection.heads_reduced(out.lse, config))


def write_rows(onto: Destination, index, indices, fresh: FreshRows) -> Destination:
    """`onto` with the rows of a block put at `indices`."""
    return Destination(
        scatter_rows(onto.tokens, indices, fresh.rows),
        token_cache.write_rows(onto.stack, index, indices, fresh.cached),
        scatter_rows(onto.lse, indices, fresh.lse),
    )


@dataclasses.dataclass(frozen=True)
class Run(Choosing):
    """One evaluation of the model: what its parts share.

    A sparse step is `begin`, for every block `open_block`, `compute_rows` for its rows and
    `close_block`, and then `finish`.
    """

    def dense(self, state: AstraeaState) -> base.Forward:
        """The plain model, which also fills the cache."""
        config = self.config
        tokens, side = self.evaluation.model.embed(self.inputs.latents, self.evaluation.prepared)
        cache = state.cache
        if config.scope == "step" or config.chained:
            cache = self.with_reference(cache, selection.view(tokens, config))

        def body(carry, block, place: Place):
            tokens, side, cache = carry
            index, groups = place.index, place.kind.groups
            out = blocks.dense_block(block, tokens, side, residual=config.reuse == "residual")
            lse = selection.heads_reduced(out.lse, config)
            cache = cache._replace(
                out=token_cache.write_block(cache.out, index, out.cached),
                lse=self.write_selection(cache.lse, index, groups, lse),
                age=self.write_selection(cache.age, index, groups, jnp.zeros_like(lse)),
                reference=self.write_reference(cache.reference, index, tokens),
            )
            return out.tokens, out.side, cache

        tokens, _, cache = self._run_blocks(body, (tokens, side, cache))
        velocity = self.evaluation.model.head(tokens, self.modulation)
        trace = blocks.full_trace(self.geometry, len(tokens))
        fresh = jnp.ones(trace.computed.shape, bool)
        return base.Forward(velocity, AstraeaState(cache, velocity), trace, fresh)

    def sparse(self, state: AstraeaState, level: int | Int[Array, ""]) -> base.Forward:
        """Some tokens in every block; `level` is a number or data."""
        choices, carry = self.begin(state, level)
        if choices is not None and len(choices) == 1 and isinstance(level, int):
            return self._sparse_rows(state, choices[0], carry, level)

        def body(carry: Carry, block, place: Place) -> Carry:
            opened = self.open_block(carry, block, place, choices, level)

            def compute(onto: Destination, indices) -> Destination:
                rows = Rows(gather_rows(opened.carry.tokens, indices), indices)
                fresh = compute_rows(self.config, block, rows, opened.shared)
                return write_rows(onto, place.index, indices, fresh)

            written = self._at_level(compute, opened.onto, opened.choice, level)
            return self.close_block(opened, written, place)

        return self.finish(self._run_blocks(body, carry), state)

    def _sparse_rows(
        self, state: AstraeaState, choice: Choice, carry: Carry, level: int
    ) -> base.Forward:
        """A step whose one selection has a known size: its rows go from block to block as rows.

        They are put among the tokens, and into the cache, where these enter the next block.
        """
        config, cache = self.config, carry.cache
        indices = self._first_rows(choice, level)
        slots = entry.slots_of(indices, self.geometry.num_tokens)
        residual = config.reuse == "residual"

        def body(carried, block, place: Place):
            leaving, side, lse = carried
            entered = entry.enter_block(
                leaving, indices, slots, place.index, block.entry, residual=residual
            )
            shared, side = block.shared(Rows(entered.tokens, None, entered.normed), side)
            rows = Rows(leaving.rows, indices, entered.normed_rows)
            fresh = compute_rows(config, block, rows, shared)
            leaving = entry.Leaving(entered.tokens, entered.stack, fresh.rows, fresh.cached)
            # One selection serves all blocks, weighed by the first block's attention.
            return leaving, side, jnp.where(place.index == 0, fresh.lse, lse)

        rows = gather_rows(carry.tokens, indices)
        leaving = entry.Leaving(carry.tokens, cache.out, rows, jnp.zeros_like(rows))
        lse = jnp.zeros_like(indices, jnp.float32)
        leaving, _, lse = self._run_blocks(body, (leaving, carry.side, lse))
        number = self.geometry.num_blocks
        entered = entry.merged(leaving, indices, number, residual=residual)
        lse = scatter_rows(cache.lse[0], indices, lse)
        carry = carry._replace(
            tokens=entered.tokens,
            cache=cache._replace(out=entered.stack, lse=lse[None]),
            previous=choice.fresh,
            computed=number * choice.fresh.astype(jnp.float32),
            overlap=jnp.full_like(carry.overlap, number - 1.0),
        )
        return self.finish(carry, state)

    def begin(
        self, state: AstraeaState, level: int | Int[Array, ""]
    ) -> tuple[tuple[Choice, ...] | None, Carry]:
        """What enters the first block, and the selections that serve the whole step.

        They are one for each of `base.splits`, or None where every block selects for itself.
        """
        config, cache = self.config, state.cache
        tokens, side = self.evaluation.model.embed(self.inputs.latents, self.evaluation.prepared)
        batch, num_tokens, _ = tokens.shape
        choices = None
        if config.scope == "step":
            choices, cache = self.choose_all(tokens, cache, level)
        # Like the tokens also in how they differ over devices, where a `shard_map` checks it.
        zeros = functools.partial(jnp.zeros_like, tokens, jnp.float32)
        before = cache.reference[0] if config.chained else zeros((batch, num_tokens, 0))
        if config.chained:
            cache = self.with_reference(cache, tokens)
        carry = Carry(
            tokens,
            side,
            before,
            cache,
            previous=jnp.zeros_like(tokens, bool, (batch, num_tokens)),
            computed=zeros((batch, num_tokens)),
            overlap=zeros((batch,)),
        )
        return choices, carry

    def open_block(self, carry: Carry, block, place: Place, choices, level) -> Opened:
        """What a block needs before any of its rows is computed; `choices` are of `begin`."""
        config, index, groups = self.config, place.index, place.kind.groups
        slot = self.slot(index, groups)
        if choices is not None:
            choice = choices[slot]
        else:
            tokens, before, cache = carry.tokens, carry.before, carry.cache
            if not config.chained:
                stack, before = token_cache.read_block(cache.reference, index)
                cache = cache._replace(reference=stack)
            choice = self.choose(tokens, before, cache, index, groups, level)
            if not config.chained:
                reference = self.merge_reference(before, tokens, choice.fresh)
                stack = token_cache.write_block(cache.reference, index, reference)
                cache = cache._replace(reference=stack)
            carry = carry._replace(cache=cache)
        shared, side = block.shared(Rows(carry.tokens), carry.side)
        # What every token would leave with if it were stale; the rows are then written over it.
        added = carry.tokens if config.reuse == "residual" else None
        stack, stale = token_cache.read_block(carry.cache.out, index, added)
        before = stale if config.chained else carry.before
        stale = stale.astype(carry.tokens.dtype)  # the cache may be narrower
        onto = Destination(stale, stack, carry.cache.lse[slot])
        return Opened(carry._replace(side=side), choice, shared, before, onto)

    def close_block(self, opened: Opened, written: Destination, place: Place) -> Carry:
        """What enters the next block, once the selected rows are computed."""
        carry, choice, index = opened.carry, opened.choice, place.index
        cache = carry.cache
        age = cache.age
        if self.config.scope == "block":
            aged = jnp.where(choice.fresh, 0, older(cache.age[index]))
            age = token_cache.write_block(age, index, aged)
        cache = cache._replace(
            out=written.stack,
            lse=self.write_selection(cache.lse, index, place.kind.groups, written.lse),
            age=age,
        )
        same = selection.overlap(choice.fresh, carry.previous)
        return carry._replace(
            tokens=written.tokens,
            before=opened.before,
            cache=cache,
            previous=choice.fresh,
            computed=carry.computed + choice.fresh.astype(jnp.float32),
            overlap=carry.overlap + jnp.where(index == 0, 0.0, same),
        )

    def finish(self, carry: Carry, state: AstraeaState) -> base.Forward:
        """The velocity and the state that the last block leaves; `state` is the step's own."""
        velocity = self.evaluation.model.head(carry.tokens, self.modulation)
        if self.config.velocity == "kept":
            velocity = jnp.where(carry.previous[..., None], velocity, state.velocity)
        number = self.geometry.num_blocks
        trace = base.Trace(
            carry.computed / number,
            carry.overlap / max(number - 1, 1),
            blocks.part_shares(self.geometry, 1.0),
        )
        return base.Forward(velocity, AstraeaState(carry.cache, velocity), trace, carry.previous)

    def _at_level(self, compute, state, choice: Choice, level):
        """Runs the selected rows: at once when their number is known, else two tenths at a time."""
        rows = choice.indices.shape[1] // selection.LEVELS
        if isinstance(level, int):
            return compute(state, self._first_rows(choice, level))

        def run(state, first, tenths: int):
            indices = lax.dynamic_slice_in_dim(choice.indices, first * rows, tenths * rows, 1)
            return compute(state, indices)

        state = lax.fori_loop(0, level // 2, lambda pair, state: run(state, 2 * pair, 2), state)
        return lax.cond(
            level % 2 == 1, lambda state: run(state, level - 1, 1), lambda state: state, state
        )

    def _first_rows(self, choice: Choice, level: int) -> Int[Array, "B K"]:
        """The selected positions; many of them in whole tiles of 8.

        Attention kernels would otherwise pad and cut them in each block. What is added lies past
        the tokens: computed like the last row, written nowhere.
        """
        indices = choice.indices[:, : level * (choice.indices.shape[1] // selection.LEVELS)]
        batch, count = indices.shape
        if count < FEW_ROWS or any(k.groups.number > 1 for k in self.geometry.kinds):
            return indices
        added = jnp.full((batch, -count % entry.PADDING), self.geometry.num_tokens, indices.dtype)
        return jnp.concatenate([indices, added], axis=1)

    def _run_blocks(self, body, carry):
        return blocks.run_blocks(self.evaluation, self.modulation, body, carry)
