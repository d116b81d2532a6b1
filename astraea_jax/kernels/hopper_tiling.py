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
      width: channels of a head in shared memory, in steps of 16; those past the head are zeros.
      block_kv: keys of a tile, in steps of 64.
      stages: tiles of keys and values in flight.
      persistent: whether a processor goes from one tile of queries to the next within a program,
        the next one's keys loading behind the end of the last; it costs registers.
      warpgroups: that compute, 2 or 3. Two take turns at the tensor cores; three leave the order to
        the hardware, and have two thirds of the registers each.
      whole: whether the channels lie in one run, padded by a copy beforehand, and not in pieces.
    """

    width: int
    block_kv: int
    stages: int
    persistent: bool = True
    warpgroups: int = 2
    whole: bool = False

    @property
    def rows(self) -> int:
        """Queries of a program."""
        return self.warpgroups * BLOCK_Q

    @property
    def in_turns(self) -> bool:
        """Whether the warpgroups take turns."""
        return self.warpgroups == 2

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread that computes, and of one that loads; 65,536 in all."""
        return {2: (240, 24), 3: (160, 32)}[self.warpgroups]


def shared_memory(tiling: Tiling, partial: bool = False) -> int:
    """Bytes of a program: queries, keys and values at two bytes a number, and what goes with them.

    The output takes the place of the queries, but a `partial` one, in float32, comes on top.
    """
    rows = tiling.rows * (3 if partial else 1) + 2 * tiling.stages * tiling.block_kv
    return 2 * tiling.width * rows + OVERHEAD


def fitted(tiling: Tiling, partial: bool) -> Tiling:
    """The tiling, with less in flight where it would take too much shared memory."""
    while shared_memory(tiling, partial) > SHARED_MEMORY:
        smaller = {"stages": tiling.stages - 1} if tiling.block_kv <= 128 else {"block_kv": 128}
        tiling = dataclasses.replace(tiling, **smaller)
    return tiling


def candidates(width: int, num_queries: int, num_keys: int) -> list[Tiling]:
    """Tilings worth timing for a head width."""
    del num_queries
    padded = width + -width % 16
    found = [
        Tiling(padded, block_kv, stages, persistent, warpgroups, whole)
        for warpgroups in (2, 3)
        for block_kv in ((128, 192) if num_keys > 64 else (64,))
        for stages in (2, 3, 4)
        for persistent in (True, False)
        for whole in ((False, True) if padded % 64 == 0 else (False,))
    ]
    # Scores, their weights and the total of a thread must fit in its registers.
    return [
        tiling
        for tiling in found
        if tiling.block_kv * 3 / 4 + tiling.width / 2 <= tiling.registers[0] - 16
        and shared_memory(tiling) <= SHARED_MEMORY
    ]
