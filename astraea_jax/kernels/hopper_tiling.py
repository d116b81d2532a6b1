"""How the Hopper kernel cuts its work, and how much shared memory that takes."""

import dataclasses
import math

LOG2_E = math.log2(math.e)
COMPUTE = 2  # warpgroups 0 and 1
MEMORY = 2  # warpgroup 2
BLOCK_Q = 64  # queries of a compute warpgroup: the rows of one wgmma
ROWS = COMPUTE * BLOCK_Q
SHARED_MEMORY = 227 * 1024  # bytes that a program may have
OVERHEAD = 2048  # log-sum-exps, barriers, scratch and alignment


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the work is cut.

    Attributes:
      width: channels of a head in shared memory, in steps of 16; heads are padded to it with zeros.
      block_kv: keys of a tile, in steps of 16.
      stages: tiles of keys and values in flight.
      persistent: whether a processor goes from one tile of queries to the next within a program,
        the next one's keys loading behind the end of the last; it costs registers.
    """

    width: int
    block_kv: int
    stages: int
    persistent: bool = True


def shared_memory(tiling: Tiling) -> int:
    """Bytes of a program: queries, keys and values at two bytes a number, and what goes with them.

    An output that can't take the place of the queries comes on top.
    """
    return 2 * tiling.width * (ROWS + 2 * tiling.stages * tiling.block_kv) + OVERHEAD


def candidates(width: int, num_queries: int, num_keys: int) -> list[Tiling]:
    """Tilings worth timing for a head width."""
    del num_queries
    return [
        Tiling(padded, block_kv, stages, persistent)
        for padded in (64, 80, 96, 128)
        for block_kv in (64, 128, 192)
        for stages in (2, 3, 4)
        for persistent in (True, False)
        if width <= padded < width + 64
        and block_kv < num_keys + 64
        and shared_memory(Tiling(padded, block_kv, stages)) <= SHARED_MEMORY
    ]
