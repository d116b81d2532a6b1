"""The token cache: a pytree that goes through the denoising loop, written here.

One kernel writes to it too, `kernels.entering`: what `write_rows` would, in a pass of its own.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped


class TokenCache(NamedTuple):
    """What each block remembers of each token. Caches start as zeros; widths may be 0.

    L blocks, B batch rows (guidance branch, prompt), N tokens, H width; S is L when every block
    selects for itself and 1 when one selection serves all (or one for each way in which kinds of
    block split the tokens).

    Attributes:
      out: the block's output, or what it added, when the token was last computed; in the dtype of
        the activations. The one large array.
      lse: natural log-sum-exp of the token's attention when last computed, float32.
      age: computed steps since the token was last computed, 0..127.
      reference: the input that a change is measured against, or its sketch; width 0 or leading
        axis S or 1 where a variant needs no more.
    """

    out: Float[Array, "L B N H"]
    lse: Float[Array, "S B N"]
    age: Int[Array, "S B N"]
    reference: Float[Array, "R B N W"]


def empty_cache(
    *,
    blocks: int,
    batch: int,
    tokens: int,
    width: int,
    dtype: jnp.dtype,
    selections: int,
    references: int,
    reference_width: int,
    reference_dtype: jnp.dtype,
) -> TokenCache:
    """Zeros of the shapes that `TokenCache` describes (selections S, references R)."""
    return TokenCache(
        out=jnp.zeros((blocks, batch, tokens, width), dtype),
        lse=jnp.zeros((selections, batch, tokens), jnp.float32),
        age=jnp.zeros((selections, batch, tokens), jnp.int8),
        reference=jnp.zeros((references, batch, tokens, reference_width), reference_dtype),
    )


def block_rows(stack: Float[Array, "L B N H"], block: Int[Array, ""]) -> Float[Array, "B N H"]:
    """What the cache holds of one block."""
    return lax.dynamic_index_in_dim(stack, block, keepdims=False)


def read_block(
    stack: Float[Array, "L B N H"],
    block: Int[Array, ""],
    onto: Float[Array, "B N H"] | None = None,
) -> tuple[Float[Array, "L B N H"], Float[Array, "B N H"]]:
    """What the cache holds of one block, and the cache to write to from here on.

    The read is ordered before any write to what this returns. Without that XLA may write first,
    and keeps the old rows by copying the whole cache, twice in every block.

    Args:
      stack: the cache's large array.
      block: which block.
      onto: what to add to the rows that are read, in the same pass over memory.
    """
    rows = block_rows(stack, block)
    return lax.optimization_barrier((stack, rows if onto is None else onto + rows))


def write_block(
    stack: Shaped[Array, "L B N *rest"],
    block: int | Int[Array, ""],
    rows: Shaped[Array, "B N *rest"],
) -> Shaped[Array, "L B N *rest"]:
    """Replaces every row of one block."""
    return lax.dynamic_update_index_in_dim(stack, rows.astype(stack.dtype), block, 0)


def write_rows(
    stack: Float[Array, "L B N H"],
    block: Int[Array, ""],
    indices: Int[Array, "B K"],
    rows: Float[Array, "B K H"],
) -> Float[Array, "L B N H"]:
    """Replaces some rows of one block, in place when the caller gives up the old cache.

    Args:
      stack: the cache's large array, as `read_block` returned it.
      block: which block.
      indices: positions, no two alike in a batch row; those past N are dropped.
      rows: what to write there.
    """
    batch = jnp.arange(stack.shape[1], dtype=jnp.int32)[:, None]
    return stack.at[block, batch, indices].set(
        rows.astype(stack.dtype), mode="drop", unique_indices=True
    )


def num_bytes(cache: TokenCache) -> int:
    """Bytes that the cache occupies."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in cache)
