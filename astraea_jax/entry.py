"""Tokens enter a block: the rows that left the last one among the stale tokens, and normed.

Where fresh tokens go from block to block as rows, they need a place among the others only where
keys and values are made of all. On a GPU that, the norm and what the cache is to keep of the rows
are one pass over memory.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from astraea_jax import cache as token_cache
from astraea_jax.attention import scatter_rows
from astraea_jax.kernels import dispatch
from astraea_jax.model import EntryNorm

PADDING = 8
"""Rows at the end whose positions may lie past the tokens."""


class Left(NamedTuple):
    """What is known where a block ends, of a step whose rows go from block to block as rows.

    Attributes:
      tokens: that entered the block; before the first, those that enter it.
      stack: the cache's large array, without what the block has to write to it.
      rows: fresh rows that left the block; before the first, those that enter it.
      kept: what the cache is to keep of them; before the first, anything.
    """

    tokens: Float[Array, "B N H"]
    stack: Float[Array, "L B N H"]
    rows: Float[Array, "B K H"]
    kept: Float[Array, "B K H"]


class Entered(NamedTuple):
    """What enters a block.

    Attributes:
      stack: the cache's large array, with what the block before has written to it.
      tokens: all of them, merged; with `normed`, those of fresh tokens may be anything.
      normed: what the block's `entry` makes of all tokens, where that comes at no cost, else None.
      normed_rows: what it makes of the rows, where `normed` is given.
    """

    stack: Float[Array, "L B N H"]
    tokens: Float[Array, "B N H"]
    normed: Float[Array, "B N H"] | None = None
    normed_rows: Float[Array, "B K H"] | None = None


def slots_of(indices: Int[Array, "B K"], num_tokens: int) -> Int[Array, "B M"]:
    """For each token its place in `indices`, -1 where it has none; behind them the last places.

    Those are not looked for among the tokens: their positions may be past the end.
    """
    batch, count = indices.shape
    places = jnp.arange(count, dtype=jnp.int32)
    at = jnp.full((batch, num_tokens), -1, jnp.int32).at[
        jnp.arange(batch, dtype=jnp.int32)[:, None], indices
    ]
    slots = at.set(places, mode="drop", unique_indices=True)
    last = places[max(0, count - PADDING) :]
    return jnp.concatenate([slots, jnp.broadcast_to(last, (batch, len(last)))], axis=1)


def merged(
    left: Left, indices: Int[Array, "B K"], index: int | Int[Array, ""], *, residual: bool
) -> Entered:
    """The tokens that enter a block, and the cache as the block before leaves it.

    Args:
      left: what left the block before.
      indices: positions of its rows, no two alike; those past N are dropped.
      index: of the block that is entered, 0..L; L is what follows the last.
      residual: whether the cache holds what blocks added, and not what left them.
    """
    tokens, before, inside = left.tokens, jnp.maximum(index - 1, 0), index > 0
    cached = token_cache.block_rows(left.stack, before)
    stale = tokens + cached if residual else cached
    stale = jnp.where(inside, stale, tokens).astype(tokens.dtype)  # the cache may be narrower
    # Ordered before the write to the cache; see `cache.read_block`.
    stack, stale = lax.optimization_barrier((left.stack, stale))
    written = jnp.where(inside, indices, tokens.shape[1])
    stack = token_cache.write_rows(stack, before, written, left.kept)
    return Entered(stack, scatter_rows(stale, indices, left.rows))


def enter_block(
    left: Left,
    indices: Int[Array, "B K"],
    slots: Int[Array, "B M"],
    index: Int[Array, ""],
    norm: EntryNorm | None,
    *,
    residual: bool,
) -> Entered:
    """As `merged`, and normed too where that comes at no cost.

    Args:
      left: what left the block before; its tokens may be those of an `Entered`.
      indices: of its rows; only the last `PADDING` of them may lie past N.
      slots: of `indices`.
      index: of the block that is entered, 0..L - 1.
      norm: the block's `entry`.
      residual: see `merged`.
    """
    if norm is None or not residual or not _one_pass(norm, left):
        return merged(left, indices, index, residual=residual)

    places = indices, slots, index
    return _one_pass_entry(norm.eps, left, places, norm.scale, norm.shift)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _one_pass_entry(eps: float, left: Left, places, scale, shift) -> Entered:
    """The kernel on CUDA, elsewhere the plain form; with a gradient."""

    def kernel(left, places, scale, shift):
        from astraea_jax.kernels import entering

        tokens, stack, rows, kept = left
        _, slots, index = places
        arrays = tokens, rows, kept, slots, stack, index, scale, shift
        return Entered(*entering.enter(*arrays, eps=eps))

    plain = functools.partial(_plain_entry, eps)
    return lax.platform_dependent(left, places, scale, shift, cuda=kernel, default=plain)


def _plain_entry(eps: float, left: Left, places, scale, shift) -> Entered:
    indices, _, index = places
    entered = merged(left, indices, index, residual=True)
    norm = EntryNorm(scale, shift, eps, left.tokens.dtype)
    return entered._replace(normed=norm(entered.tokens), normed_rows=norm(left.rows))


def _entry_forward(eps: float, left: Left, places, scale, shift):
    return _one_pass_entry(eps, left, places, scale, shift), (left, places, scale, shift)


def _entry_backward(eps: float, saved, gradients: Entered):
    left, places, scale, shift = saved
    plain = functools.partial(_plain_entry, eps)
    _, back = jax.vjp(lambda left, *norm: plain(left, places, *norm), left, scale, shift)
    to_left, to_scale, to_shift = back(gradients)
    return to_left, None, to_scale, to_shift


_one_pass_entry.defvjp(_entry_forward, _entry_backward)


def _one_pass(norm: EntryNorm, left: Left) -> bool:
    """Whether a program traced here may run the kernel, on CUDA."""
    dtypes = {jnp.dtype(each.dtype) for each in (norm, *left)}
    if len(dtypes) > 1 or dispatch.refusal("triton", dispatch.gpu(), 0, left.tokens.dtype):
        return False
    from astraea_jax.kernels import entering

    return entering.part_width(left.tokens.shape[-1]) is not None
