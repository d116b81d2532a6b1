"""Tokens enter a block: the rows that left the last one among the stale tokens, and normed.

Where fresh tokens go from block to block as rows, they need a place among the others only where
keys and values are made of all. On a GPU that and the norm before are one pass over memory.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from astraea_jax import cache as token_cache
from astraea_jax.attention import scatter_rows
from astraea_jax.kernels import dispatch
from astraea_jax.model import EntryNorm


def slots_of(indices: Int[Array, "B K"], num_tokens: int) -> Int[Array, "B N"]:
    """For each token its place in `indices`, -1 where it has none."""
    batch, count = indices.shape
    none = jnp.full((batch, num_tokens), -1, jnp.int32)
    at = none.at[jnp.arange(batch)[:, None], indices]
    return at.set(jnp.arange(count, dtype=jnp.int32), mode="drop", unique_indices=True)


def merged(
    tokens: Float[Array, "B N H"],
    rows: Float[Array, "B K H"],
    indices: Int[Array, "B K"],
    stack: Float[Array, "L B N H"],
    index: int | Int[Array, ""],
    *,
    residual: bool,
) -> tuple[Float[Array, "L B N H"], Float[Array, "B N H"]]:
    """The tokens that enter a block, and the cache to write to from here on.

    Args:
      tokens: that entered the block before, or that enter this one where it is the first.
      rows: fresh rows that left the block before.
      indices: their positions, no two alike; those past N are dropped.
      stack: the cache's large array.
      index: of the block that is entered, 0..L; L is what follows the last.
      residual: whether the cache holds what blocks added, and not what left them.
    """
    cached = token_cache.block_rows(stack, jnp.maximum(index - 1, 0))
    stale = tokens + cached if residual else cached
    stale = jnp.where(index > 0, stale, tokens).astype(tokens.dtype)  # the cache may be narrower
    # Ordered before any write to the cache; see `cache.read_block`.
    stack, stale = lax.optimization_barrier((stack, stale))
    return stack, scatter_rows(stale, indices, rows)


def enter_block(
    tokens: Float[Array, "B N H"],
    rows: Float[Array, "B K H"],
    indices: Int[Array, "B K"],
    slots: Int[Array, "B N"],
    stack: Float[Array, "L B N H"],
    index: Int[Array, ""],
    norm: EntryNorm | None,
    *,
    residual: bool,
) -> tuple[Float[Array, "L B N H"], Float[Array, "B N H"], Float[Array, "B N H"] | None]:
    """As `merged`, and what `norm` makes of the tokens where that comes at no cost, else None.

    Args:
      tokens: see `merged`, as for what is not named here.
      rows: of `slots` too.
      indices: of the rows.
      slots: of `indices`.
      stack: the cache's large array.
      index: of the block that is entered, 0..L - 1.
      norm: of that block; None where it has none that can be told apart.
      residual: see `merged`.
    """
    plain = functools.partial(merged, residual=residual)
    if norm is None or not residual or not _one_pass(norm, tokens, rows, stack):
        return *plain(tokens, rows, indices, stack, index), None

    def kernel(tokens, rows, indices, slots, stack, index, scale, shift):
        del indices
        from astraea_jax.kernels import entering

        return stack, *entering.enter(tokens, rows, slots, stack, index, scale, shift, eps=norm.eps)

    def reference(tokens, rows, indices, slots, stack, index, scale, shift):
        del slots
        stack, tokens = plain(tokens, rows, indices, stack, index)
        return stack, tokens, norm._replace(scale=scale, shift=shift)(tokens)

    operands = (tokens, rows, indices, slots, stack, index, norm.scale, norm.shift)
    return lax.optimization_barrier(
        lax.platform_dependent(*operands, cuda=kernel, default=reference)
    )


def _one_pass(norm: EntryNorm, tokens, rows, stack) -> bool:
    """Whether a program traced here may run the kernel, on CUDA."""
    dtypes = {jnp.dtype(each.dtype) for each in (norm, tokens, rows, stack)}
    if len(dtypes) > 1 or dispatch.refusal("triton", dispatch.gpu(), 0, tokens.dtype):
        return False
    from astraea_jax.kernels import entering

    return entering.part_width(tokens.shape[-1]) is not None
