"""Analytic floating-point operations of a run; a multiply-add counts as two.

Source: ASTRAEA A.3, with the model's true feed-forward width, as the paper's Table 1 counts.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from astraea_jax import checks
from astraea_jax.schedule import LEVELS, check_levels, rows_at

LARGEST = 1 << 31
"""Tokens, channels or blocks: far more than any model has, and products still fit a float."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """Sizes that decide the cost of one video on one guidance branch.

    Attributes:
      num_blocks: blocks, L.
      num_tokens: N.
      width: H.
      ffn_width: hidden channels of the feed-forward.
      text_tokens: keys of the cross-attention, padding included where the model attends to it.
      keys: keys that a query attends to in self-attention; N, or the size of its group.
      groups: groups of tokens that have equally many rows computed; see `schedule.rows_at`. A
        model of several kinds of block is a workload for each.

    Raises:
      Refusal: a size that is none.
    """

    num_blocks: int
    num_tokens: int
    width: int
    ffn_width: int
    text_tokens: int
    keys: int
    groups: int = 1

    def __post_init__(self):
        for field in dataclasses.fields(self):
            checks.whole(field.name, getattr(self, field.name), 1, LARGEST)
        checks.whole("groups", self.groups, 1, self.num_tokens, unit="(the tokens)")

    def rows_at(self, level: int) -> int:
        """Tokens computed in each block at `level` (0..10)."""
        return rows_at(level, self.num_tokens, self.groups)


class BlockFlops(NamedTuple):
    """Operations of one block on one branch, by what they belong to.

    Attributes:
      keys_values: projections of all tokens, which no budget reduces.
      self_attention: query and output projections and attention of the computed rows.
      cross_attention: the same for the text.
      mlp: the feed-forward of the computed rows.
    """

    keys_values: float
    self_attention: float
    cross_attention: float
    mlp: float


def block_flops(workload: Workload, rows: int) -> BlockFlops:
    """One block when `rows` tokens are computed; text keys and values not counted."""
    width = workload.width
    if rows == 0:
        return BlockFlops(0, 0, 0, 0)
    projections = 4 * rows * width**2
    return BlockFlops(
        keys_values=4 * workload.num_tokens * width**2,
        self_attention=projections + 4 * rows * workload.keys * width,
        cross_attention=projections + 4 * rows * workload.text_tokens * width,
        mlp=4 * rows * width * workload.ffn_width,
    )


def text_flops(workload: Workload) -> float:
    """Keys and values of the text in every block, on one branch."""
    return 4 * workload.text_tokens * workload.width**2 * workload.num_blocks


def step_flops(workload: Workload, rows: int) -> float:
    """One step on one branch when `rows` tokens are computed in every block."""
    return workload.num_blocks * sum(block_flops(workload, rows))


def run_flops(
    workload: Workload,
    levels: Sequence[int],
    *,
    branches: int = 2,
    text_every_step: bool = False,
) -> float:
    """All blocks of a denoising run.

    Args:
      workload: sizes.
      levels: tenths of the tokens computed at each step, 0..10.
      branches: guidance branches.
      text_every_step: counts the text's keys and values at every computed step, as the paper's
        tables do; this library computes them once a run.

    Raises:
      Refusal: levels that are none.
    """
    levels = check_levels(levels, dense_start=0)
    checks.whole("branches", branches, 1, 2)
    text = text_flops(workload)
    computed = [level for level in levels if level]
    total = sum(step_flops(workload, workload.rows_at(level)) for level in computed)
    return branches * (total + text * (len(computed) if text_every_step else 1))


def speedup_bound(workload: Workload, level: int) -> float:
    """How many times faster than dense a step at `level` (1..10) can be, by operations alone."""
    checks.whole("level", level, 1, LEVELS)
    dense = step_flops(workload, workload.num_tokens)
    return dense / step_flops(workload, workload.rows_at(level))
