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
      whole: whether the channels lie in one run, and not in pieces, where queries and keys are
        multiples of 8 and heads as wide: at 128 channels it is 4 % faster.
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


def fitted(tiling: Tiling, queries: int, keys: int, width: int, partial: bool) -> Tiling:
    """The tiling, whole only where it can be, and with less in flight where memory is short.

    Args:
      tiling: as wanted.
      queries: of a head.
      keys: of a head.
      width: channels of a head.
      partial: see `shared_memory`.
    """
    if queries % 8 or keys % 8 or width != tiling.width:
        tiling = dataclasses.replace(tiling, whole=False)
    while shared_memory(tiling, partial) > SHARED_MEMORY:
        smaller = {"stages": tiling.stages - 1} if tiling.block_kv <= 128 else {"block_kv": 128}
        tiling = dataclasses.replace(tiling, **smaller)
    return tiling


def candidates(width: int, num_queries: int, num_keys: int) -> list[Tiling]:
    """Tilings worth timing for a head width."""
    padded = width + -width % 16
    can_be_whole = padded % 64 == num_queries % 8 == num_keys % 8 == 0
    found = [
        Tiling(padded, block_kv, stages, persistent, warpgroups, whole)
        for warpgroups in (2, 3)
        for block_kv in ((128, 192) if num_keys > 64 else (64,))
        for stages in (2, 3, 4)
        for persistent in (True, False)
        for whole in ((False, True) if can_be_whole else (False,))
    ]
    # Scores, their weights and the total of a thread must fit in its registers.
    return [
        tiling
        for tiling in found
        if tiling.block_kv * 3 / 4 + tiling.width / 2 <= tiling.registers[0] - 16
        and shared_memory(tiling) <= SHARED_MEMORY
    ]
