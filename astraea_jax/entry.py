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
from astraea_jax.model import EntryNorm, Rows

PADDING = 8
"""Rows at the end whose positions may lie past the tokens."""


class Leaving(NamedTuple):
    """What is known where a block ends, of a step whose rows go from block to block as rows.

    Attributes:
      tokens: that entered the block; before the first, those that enter it.
      stack: the cache's large array, without what the block has to write to it.
      rows: fresh rows that left the block; before the first, those that enter it.
      cached: what the cache is to hold of them; before the first, anything.
    """

    tokens: Float[Array, "B N H"]
    stack: Float[Array, "L B N H"]
    rows: Float[Array, "B K H"]
    cached: Float[Array, "B K H"]


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
    leaving: Leaving, indices: Int[Array, "B K"], index: int | Int[Array, ""], *, residual: bool
) -> Entered:
    """The tokens that enter a block, and the cache as the block before leaves it.

    Args:
      leaving: what left the block before.
      indices: positions of its rows, no two alike; those past N are dropped.
      index: of the block that is entered, 0..L; L is what follows the last.
      residual: whether the cache holds what blocks added, and not what left them.
    """
    tokens, before, inside = leaving.tokens, jnp.maximum(index - 1, 0), index > 0
    cached = token_cache.block_rows(leaving.stack, before)
    stale = tokens + cached if residual else cached
    stale = jnp.where(inside, stale, tokens).astype(tokens.dtype)  # the cache may be narrower
    # Ordered before the write to the cache; see `cache.read_block`.
    stack, stale = lax.optimization_barrier((leaving.stack, stale))
    written = jnp.where(inside, indices, tokens.shape[1])
    stack = token_cache.write_rows(stack, before, written, leaving.cached)
    return Entered(stack, scatter_rows(stale, indices, leaving.rows))


def enter_block(
    leaving: Leaving,
    indices: Int[Array, "B K"],
    slots: Int[Array, "B M"],
    index: Int[Array, ""],
    norm: EntryNorm | None,
    *,
    residual: bool,
) -> Entered:
    """As `merged`, and normed too where that comes at no cost.

    Args:
      leaving: what left the block before; its tokens may be those of an `Entered`.
      indices: of its rows; only the last `PADDING` of them may lie past N.
      slots: of `indices`.
      index: of the block that is entered, 0..L - 1.
      norm: the block's `entry`.
      residual: see `merged`.
    """
    if norm is None or not residual or not _one_pass(norm, leaving):
        return merged(leaving, indices, index, residual=residual)

    places = indices, slots, index
    return _one_pass_entry(norm.eps, leaving, places, norm.scale, norm.shift)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _one_pass_entry(eps: float, leaving: Leaving, places, scale, shift) -> Entered:
    """The kernel on CUDA, elsewhere the plain form; with a gradient."""

    def kernel(leaving, places, scale, shift):
        from astraea_jax.kernels import entering

        tokens, stack, rows, cached = leaving
        _, slots, index = places
        arrays = tokens, rows, cached, slots, stack, index, scale, shift
        return Entered(*entering.enter(*arrays, eps=eps))

    plain = functools.partial(_plain_entry, eps)
    return lax.platform_dependent(leaving, places, scale, shift, cuda=kernel, default=plain)


def _plain_entry(eps: float, leaving: Leaving, places, scale, shift) -> Entered:
    indices, _, index = places
    entered = merged(leaving, indices, index, residual=True)
    norm = EntryNorm(scale, shift, eps, leaving.tokens.dtype)
    return entered._replace(normed=norm(Rows(entered.tokens)), normed_rows=norm(Rows(leaving.rows)))


def _entry_forward(eps: float, leaving: Leaving, places, scale, shift):
    return _one_pass_entry(eps, leaving, places, scale, shift), (leaving, places, scale, shift)


def _entry_backward(eps: float, saved, gradients: Entered):
    leaving, places, scale, shift = saved
    plain = functools.partial(_plain_entry, eps)
    _, back = jax.vjp(lambda leaving, *norm: plain(leaving, places, *norm), leaving, scale, shift)
    to_left, to_scale, to_shift = back(gradients)
    return to_left, None, to_scale, to_shift


_one_pass_entry.defvjp(_entry_forward, _entry_backward)


def _one_pass(norm: EntryNorm, leaving: Leaving) -> bool:
    """Whether a program traced here may run the kernel, on CUDA; it scales all tokens alike."""
    if norm.scale.shape[1] != 1:
        return False
    dtypes = {jnp.dtype(each.dtype) for each in (norm, *leaving)}
    if len(dtypes) > 1 or dispatch.refusal("triton", dispatch.gpu(), 0, leaving.tokens.dtype):
        return False
    from astraea_jax.kernels import entering

    return entering.part_width(leaving.tokens.shape[-1]) is not None
