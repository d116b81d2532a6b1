"""Splitting the keys among more programs than there are tiles of queries, and the exact merge."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

MOST_SPLITS = 16
LAUNCH = 10
"""What a launch and the merge of its parts cost, in tiles of keys: some 25 microseconds."""
PART = 1.1
"""How much longer a part takes with a tile of keys: smaller tiles, an output in float32."""
LEAST_GAIN = 0.01
"""Share of the time that a second launch must save."""


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


class Tail(NamedTuple):
    """The end of the queries, computed by a launch of its own with the keys in parts.

    Attributes:
      tiles: of queries, the last ones of each head; 0 means no such launch.
      splits: parts of the keys.
    """

    tiles: int
    splits: int


def tail(tiles: int, heads: int, key_tiles: int, processors: int) -> Tail:
    """What to leave of the last wave of programs, where it would fill little of the chip.

    Programs take equally long, so that a chip runs them in waves, and a last wave of a few takes as
    long as a full one. Its tiles are cut along the keys instead, until the parts fill the chip.

    Args:
      tiles: of queries of a head.
      heads: of all rows of the batch.
      key_tiles: tiles of keys.
      processors: programs that run at once.
    """
    first = tiles * heads // processors * processors // heads  # tiles that full waves hold
    left, found = tiles - first, Tail(0, 1)
    if not first or not left:
        return found

    def waves(programs: int) -> int:
        return -(-programs // processors)

    least = waves(tiles * heads) * key_tiles * (1 - LEAST_GAIN)
    for splits in range(2, min(MOST_SPLITS, key_tiles) + 1):
        part = PART * (-(-key_tiles // splits) + 1)
        cost = waves(first * heads) * key_tiles + waves(left * heads * splits) * part + LAUNCH
        if cost < least:
            least, found = cost, Tail(left, splits)
    return found


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
