"""How the Hopper kernel cuts its work, and how much shared memory that takes."""

import dataclasses
import math

LOG2_E = math.log2(math.e)
BLOCK_Q = 64  # queries of a compute warpgroup: the rows of one wgmma
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
    warpgroups: int = 2
    turns: str = "softmax"
    slabs: bool = False
    overlap: bool = False

    @property
    def rows(self) -> int:
        """Queries of a program."""
        return self.warpgroups * BLOCK_Q

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread that computes, and of one that loads."""
        return {2: (240, 24), 3: (160, 32)}[self.warpgroups]

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """Channels as they lie in shared memory, in runs of one width: [(first, channels)]."""
        if not self.slabs:
            return [(0, self.width)]
        found, first = [], 0
        while first < self.width:
            size = next(n for n in (64, 32, 16) if n <= self.width - first)
            found.append((first, size))
            first += size
        return found


def shared_memory(tiling: Tiling) -> int:
    """Bytes of a program: queries, keys and values at two bytes a number, and what goes with them.

    An output that can't take the place of the queries comes on top.
    """
    return 2 * tiling.width * (tiling.rows + 2 * tiling.stages * tiling.block_kv) + OVERHEAD


def candidates(width: int, num_queries: int, num_keys: int) -> list[Tiling]:
    """Tilings worth timing for a head width."""
    del num_queries
    padded = width + -width % 16
    found = [
        Tiling(padded, block_kv, stages, padded <= 96, warpgroups, turns, slabs)
        for slabs in (True, False)
        for block_kv, stages, warpgroups, turns in (
            [(128, 4, 3, ""), (128, 3, 3, ""), (128, 4, 2, "softmax"), (192, 2, 2, "softmax")]
            if padded <= 96
            else [(192, 2, 2, "softmax"), (128, 2, 2, "softmax"), (128, 3, 2, "softmax")]
        )
        if block_kv < num_keys + 64
    ]
    return [t for t in found if shared_memory(t) <= SHARED_MEMORY]
