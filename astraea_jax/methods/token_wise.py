"""One evaluation of a model with some of its tokens computed: what `astraea.Astraea` runs."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from astraea_jax import cache as token_cache
from astraea_jax import entry, selection
from astraea_jax import model as core
from astraea_jax.attention import gather_rows, scatter_rows
from astraea_jax.cache import TokenCache
from astraea_jax.methods import base
from astraea_jax.model import Geometry, Groups, Prepared, VideoDiT
from astraea_jax.selection import SelectionConfig

FEW_ROWS = 1024
"""Rows below which eight more would be a cost."""


class AstraeaState(NamedTuple):
    """The token cache and the last velocity, which a step at level 0 reuses whole."""

    cache: TokenCache
    velocity: Float[Array, "B N P"]


class Choice(NamedTuple):
    """One selection.

    Attributes:
      indices: positions by falling score, padded with N; see `selection.order`.
      fresh: which tokens are computed.
    """

    indices: Int[Array, "B M"]
    fresh: Bool[Array, "B N"]


class Carry(NamedTuple):
    """What goes from block to block within a sparse step.

    Attributes:
      tokens: entering the block.
      before: what entered it a step earlier, where that is known without a slot of its own.
      cache: the token cache.
      previous: the selection of the block before.
      computed: blocks so far that computed each token.
      overlap: sum of the overlaps of consecutive selections so far.
    """

    tokens: Float[Array, "B N H"]
    before: Float[Array, "B N W"]
    cache: TokenCache
    previous: Bool[Array, "B N"]
    computed: Float[Array, "B N"]
    overlap: Float[Array, "B"]


class Filled(NamedTuple):
    """What the selected rows of a block are written to, or the rows themselves.

    Attributes:
      merged: the tokens that leave the block: stale ones from the start, fresh ones once written.
      out: the cache's large array, of all blocks; of rows, what is kept of them.
      lse: one log-sum-exp a token.
    """

    merged: Float[Array, "B K H"]
    out: Array
    lse: Float[Array, "B K"]


class Opened(NamedTuple):
    """A block before its rows are computed.

    Attributes:
      carry: what entered the block, its reference brought up to date.
      choice: which rows to compute.
      keys_values: of all tokens.
      before: what entered the next block a step earlier; see `Carry`.
      filled: what the rows are written to.
    """

    carry: Carry
    choice: Choice
    keys_values: Any
    before: Float[Array, "B N W"]
    filled: Filled


def older(age: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Ages a step later; int8 holds up to 127, beyond any cap."""
    return jnp.minimum(age, 126) + jnp.int8(1)


def compute_rows(config: SelectionConfig, block, rows, indices, keys_values, normed=None) -> Filled:
    """A block on some of its rows: what each of the three arrays gets there."""
    fresh, lse = core.apply_block(block, rows, indices, keys_values, normed)
    kept = fresh
    if config.reuse == "residual":
        # Both are made in one pass, where the rows were: else XLA keeps those aside in each block.
        fresh, kept = lax.optimization_barrier((fresh, fresh - rows))
    return Filled(fresh, kept, selection.heads_reduced(lse, config))


def write_rows(filled: Filled, index, indices, fresh: Filled) -> Filled:
    """`filled` with the rows of a block put at `indices`."""
    return Filled(
        scatter_rows(filled.merged, indices, fresh.merged),
        token_cache.write_rows(filled.out, index, indices, fresh.out),
        scatter_rows(filled.lse, indices, fresh.lse),
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """One evaluation of the model: what its parts share.

    A sparse step is `begin`, for every block `open_block`, `compute_rows` for its rows in any
    number of pieces, `close_block`, and then `finish`; a driver of many runs at once may lay the
    pieces of all of them out as one list.
    """

    config: SelectionConfig
    model: VideoDiT
    prepared: Prepared
    modulation: core.Modulation
    geometry: Geometry
    inputs: base.StepInputs
    num_branches: int
    masked: bool = False

    def dense(self, state: AstraeaState) -> base.Forward:
        """The plain model, which also fills the cache."""
        config = self.config
        tokens = self.model.embed(self.inputs.latents)
        cache = state.cache
        if config.scope == "step" or config.chained:
            cache = self._with_reference(cache, selection.view(tokens, config))

        def step(carry, block, index, groups):
            tokens, cache = carry
            residual = config.reuse == "residual"
            out, lse, kept = base.dense_block(block, tokens, residual=residual)
            lse = selection.heads_reduced(lse, config)
            cache = cache._replace(
                out=token_cache.write_block(cache.out, index, kept),
                lse=self._write_selection(cache.lse, index, groups, lse),
                age=self._write_selection(cache.age, index, groups, jnp.zeros_like(lse)),
                reference=self._write_reference(cache.reference, index, tokens),
            )
            return out, cache

        tokens, cache = self._scan(step, (tokens, cache))
        velocity = self.model.head(tokens, self.modulation)
        trace = base.full_trace(tokens.shape[0], tokens.shape[1])
        fresh = jnp.ones(trace.computed.shape, bool)
        return base.Forward(velocity, AstraeaState(cache, velocity), trace, fresh)

    def sparse(self, state: AstraeaState, level: int | Int[Array, ""]) -> base.Forward:
        """Some tokens in every block; `level` is a number or data."""
        choices, carry = self.begin(state, level)
        if choices is not None and len(choices) == 1 and isinstance(level, int):
            return self._sparse_rows(state, choices[0], carry, level)

        def step(carry: Carry, block, index, groups) -> Carry:
            opened = self.open_block(carry, block, index, groups, choices, level)

            def compute(filled: Filled, indices) -> Filled:
                rows = gather_rows(opened.carry.tokens, indices)
                fresh = compute_rows(self.config, block, rows, indices, opened.keys_values)
                return write_rows(filled, index, indices, fresh)

            filled = self._at_level(compute, opened.filled, opened.choice, level)
            return self.close_block(opened, filled, index, groups)

        return self.finish(self._scan(step, carry), state)

    def _sparse_rows(
        self, state: AstraeaState, whole: Choice, carry: Carry, level: int
    ) -> base.Forward:
        """A step whose one selection has a known size: its rows go from block to block as rows.

        They are put among the tokens, and into the cache, where these enter the next block.
        """
        config, cache = self.config, carry.cache
        indices = self._first_rows(whole, level)
        slots = entry.slots_of(indices, self.geometry.num_tokens)
        residual = config.reuse == "residual"

        def step(carried, block, index, groups):
            del groups
            left, lse = carried
            entered = entry.enter_block(left, indices, slots, index, block.entry, residual=residual)
            known = () if entered.normed is None else (entered.normed,)
            keys_values = block.keys_values(entered.tokens, *known)
            fresh = compute_rows(
                config, block, left.rows, indices, keys_values, entered.normed_rows
            )
            left = entry.Left(entered.tokens, entered.stack, fresh.merged, fresh.out)
            # One selection serves all blocks, weighed by the first block's attention.
            return left, jnp.where(index == 0, fresh.lse, lse)

        rows = gather_rows(carry.tokens, indices)
        left = entry.Left(carry.tokens, cache.out, rows, jnp.zeros_like(rows))
        left, lse = self._scan(step, (left, jnp.zeros_like(indices, jnp.float32)))
        blocks = self.geometry.num_blocks
        entered = entry.merged(left, indices, blocks, residual=residual)
        lse = scatter_rows(cache.lse[0], indices, lse)
        carry = carry._replace(
            tokens=entered.tokens,
            cache=cache._replace(out=entered.stack, lse=lse[None]),
            previous=whole.fresh,
            computed=blocks * whole.fresh.astype(jnp.float32),
            overlap=jnp.full_like(carry.overlap, blocks - 1.0),
        )
        return self.finish(carry, state)

    def begin(
        self, state: AstraeaState, level: int | Int[Array, ""]
    ) -> tuple[tuple[Choice, ...] | None, Carry]:
        """What enters the first block, and the selections that serve the whole step.

        They are one for each of `base.splits`, or None where every block selects for itself.
        """
        config, cache = self.config, state.cache
        tokens = self.model.embed(self.inputs.latents)
        batch, num_tokens, _ = tokens.shape
        choices = None
        if config.scope == "step":
            choices, cache = self._choose_all(tokens, cache, level)
        # Like the tokens also in how they differ over devices, where a `shard_map` checks it.
        zeros = functools.partial(jnp.zeros_like, tokens, jnp.float32)
        before = cache.reference[0] if config.chained else zeros((batch, num_tokens, 0))
        if config.chained:
            cache = self._with_reference(cache, tokens)
        carry = Carry(
            tokens,
            before,
            cache,
            previous=jnp.zeros_like(tokens, bool, (batch, num_tokens)),
            computed=zeros((batch, num_tokens)),
            overlap=zeros((batch,)),
        )
        return choices, carry

    def open_block(self, carry: Carry, block, index, groups, choices, level) -> Opened:
        """What a block needs before any of its rows is computed; `choices` are of `begin`."""
        config, slot = self.config, self._slot(index, groups)
        if choices is not None:
            choice = choices[slot]
        else:
            tokens, before, cache = carry.tokens, carry.before, carry.cache
            if not config.chained:
                stack, before = token_cache.read_block(cache.reference, index)
                cache = cache._replace(reference=stack)
            choice = self._choose(tokens, before, cache, index, groups, level)
            if not config.chained:
                reference = self._merge_reference(before, tokens, choice.fresh)
                stack = token_cache.write_block(cache.reference, index, reference)
                cache = cache._replace(reference=stack)
            carry = carry._replace(cache=cache)
        keys_values = block.keys_values(carry.tokens)
        # What every token would leave with if it were stale; the rows are then written over it.
        onto = carry.tokens if config.reuse == "residual" else None
        out, merged = token_cache.read_block(carry.cache.out, index, onto)
        before = merged if config.chained else carry.before
        merged = merged.astype(carry.tokens.dtype)  # the cache may be narrower
        lse = carry.cache.lse[slot]
        return Opened(carry, choice, keys_values, before, Filled(merged, out, lse))

    def close_block(self, opened: Opened, filled: Filled, index, groups) -> Carry:
        """What enters the next block, once the selected rows are computed."""
        carry, choice = opened.carry, opened.choice
        cache = carry.cache
        age = cache.age
        if self.config.scope == "block":
            aged = jnp.where(choice.fresh, 0, older(cache.age[index]))
            age = token_cache.write_block(age, index, aged)
        cache = cache._replace(
            out=filled.out,
            lse=self._write_selection(cache.lse, index, groups, filled.lse),
            age=age,
        )
        same = selection.overlap(choice.fresh, carry.previous)
        return Carry(
            tokens=filled.merged,
            before=opened.before,
            cache=cache,
            previous=choice.fresh,
            computed=carry.computed + choice.fresh.astype(jnp.float32),
            overlap=carry.overlap + jnp.where(index == 0, 0.0, same),
        )

    def finish(self, carry: Carry, state: AstraeaState) -> base.Forward:
        """The velocity and the state that the last block leaves; `state` is the step's own."""
        velocity = self.model.head(carry.tokens, self.modulation)
        if self.config.velocity == "kept":
            velocity = jnp.where(carry.previous[..., None], velocity, state.velocity)
        blocks = self.geometry.num_blocks
        trace = base.Trace(carry.computed / blocks, carry.overlap / max(blocks - 1, 1))
        return base.Forward(velocity, AstraeaState(carry.cache, velocity), trace, carry.previous)

    def _at_level(self, compute, state, choice: Choice, level):
        """Runs the selected rows: at once when their number is known, else as `pieces` says."""
        rows = choice.indices.shape[1] // selection.LEVELS
        if isinstance(level, int):
            return compute(state, self._first_rows(choice, level))

        if self.masked:
            place, past = (
                jnp.arange(choice.indices.shape[1], dtype=jnp.int32),
                self.geometry.num_tokens,
            )
            return compute(state, jnp.where(place < level * rows, choice.indices, past))

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
        if count < FEW_ROWS or any(groups.number > 1 for groups in self.geometry.groups):
            return indices
        added = jnp.full((batch, -count % entry.PADDING), self.geometry.num_tokens, indices.dtype)
        return jnp.concatenate([indices, added], axis=1)

    def _choose_all(
        self, tokens, cache: TokenCache, level
    ) -> tuple[tuple[Choice, ...], TokenCache]:
        """Selects the tokens of all blocks, and what the cache then holds of the selections."""
        choices, ages, references = [], [], []
        for slot, groups in enumerate(base.splits(self.geometry)):
            before = cache.reference[slot]
            choice = self._choose(tokens, before, cache, slot, groups, level)
            choices.append(choice)
            ages.append(jnp.where(choice.fresh, 0, older(cache.age[slot])))
            references.append(self._merge_reference(before, tokens, choice.fresh))
        return tuple(choices), cache._replace(
            age=jnp.stack(ages).astype(cache.age.dtype),
            reference=jnp.stack(references).astype(cache.reference.dtype),
        )

    def _choose(self, tokens, before, cache: TokenCache, slot, groups, level) -> Choice:
        """Selects the tokens of one block, or with scope "step" of all that a split serves."""
        config = self.config
        batch, num_tokens, _ = tokens.shape
        age = cache.age[slot]
        if config.rank == "random":
            key: Key[Array, ""] = base.fold(self.inputs.key, slot)
            shape = (batch, num_tokens)
            scores = selection.random_score(key, shape, config, self.num_branches)
        else:
            delta = selection.change(selection.view(tokens, config), before, config)
            scores = selection.score(cache.lse[slot], delta, age, config)
            if config.branches == "shared":
                scores = selection.shared_score(scores, self.num_branches)
        ordered = selection.order(scores, age, groups=groups.number, contiguous=groups.contiguous)
        count = level * (ordered.shape[1] // selection.LEVELS)
        return Choice(ordered, selection.selected_mask(ordered, count, num_tokens))

    def _slot(self, index, groups: Groups):
        """Where the cache holds LSE and age of a block's selection: at its index, or its split."""
        return index if self.config.scope == "block" else base.split_of(self.geometry, groups)

    def _write_selection(self, stack, index, groups: Groups, rows):
        """Stores LSE or age of a block; where one selection serves many, of their first alone."""
        slot = self._slot(index, groups)
        if self.config.scope == "step":
            slots = [base.split_of(self.geometry, each) for each in self.geometry.groups]
            rows = jnp.where(index == slots.index(slot), rows.astype(stack.dtype), stack[slot])
        return token_cache.write_block(stack, slot, rows)

    def _with_reference(self, cache: TokenCache, tokens: Float[Array, "B N W"]) -> TokenCache:
        """The cache with the one reference that serves all blocks."""
        reference = jnp.broadcast_to(tokens.astype(cache.reference.dtype), cache.reference.shape)
        return cache._replace(reference=reference)

    def _write_reference(self, stack, index, tokens):
        """Stores a block's whole input where blocks keep references of their own."""
        if self.config.scope == "step" or self.config.chained:
            return stack
        return token_cache.write_block(stack, index, selection.view(tokens, self.config))

    def _merge_reference(self, before, tokens, fresh):
        """The reference after a step: all tokens as they are now, or only the computed ones."""
        now = selection.view(tokens, self.config)
        if self.config.reference == "previous":
            return now
        return jnp.where(fresh[..., None], now, before)

    def _scan(self, step, carry):
        return base.scan_blocks(
            self.model, self.prepared, self.modulation, self.geometry, step, carry
        )
