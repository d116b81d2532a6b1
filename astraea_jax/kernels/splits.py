"""Splitting the keys among more programs than there are tiles of queries, and the exact merge."""

import jax.numpy as jnp
from jaxtyping import Array, Float

MOST_SPLITS = 16


def num_splits(num_programs: int, num_tiles: int, processors: int) -> int:
    """How many parts to cut the keys into, so that the programs fill the chip.

    Args:
      num_programs: programs without a split: tiles of queries x heads x batch.
      num_tiles: tiles of keys; a part has one or more.
      processors: programs that run at once.

    Returns:
      1 where the programs fill more than half of the chip: a split could not double their number.
    """
    if 2 * num_programs > processors:
        return 1
    return max(1, min(processors // num_programs, num_tiles, MOST_SPLITS))


def merge(
    outs: Float[Array, "S B K A C"], lses: Float[Array, "S B A K"]
) -> tuple[Float[Array, "B K A C"], Float[Array, "B A K"]]:
    """Attention to all keys, from attention to each part of them, in float32.

    A row that no part has seen (out 0 and lse -inf in each) stays so.
    """
    largest = lses.max(axis=0)
    # A row in no use has nothing to subtract: -inf minus -inf would be NaN.
    largest = jnp.where(jnp.isneginf(largest), 0.0, largest)
    weights = jnp.exp(lses - largest)
    total = weights.sum(axis=0)
    shares = (weights / jnp.where(total == 0, 1.0, total)).swapaxes(2, 3)
    return (outs * shares[..., None]).sum(axis=0), largest + jnp.log(total)
