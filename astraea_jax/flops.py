"""Analytic floating-point operations of a run; a multiply-add counts as two.

Source: ASTRAEA A.3, with the model's true feed-forward width, as the paper's Table 1 counts.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from astraea_jax import checks
from astraea_jax.checks import Refusal
from astraea_jax.schedule import LEVELS, check_levels, rows_at

LARGEST = 1 << 31
"""Tokens, channels or blocks: far more than any model has, and products still fit a float."""

SHARING = ("self", "fused")
"""Parts that read keys and values of all tokens."""


class BlockSizes(NamedTuple):
    """Sizes of the blocks of a kind.

    Attributes:
      number: of such blocks.
      ffn_width: hidden channels of the feed-forward.
      text_tokens: keys of the cross-attention, padding included where the model attends to it.
      keys: keys that a query attends to in self-attention; N, or the size of its group.
      groups: groups of tokens that have equally many rows computed; see `schedule.rows_at`.
      name: of the kind.
      parts: its sub-layers: "self", "cross", "mlp", or "fused", which is "self" and "mlp" in one.
    """

    number: int
    ffn_width: int
    text_tokens: int
    keys: int
    groups: int = 1
    name: str = "block"
    parts: tuple[str, ...] = ("self", "cross", "mlp")


@dataclasses.dataclass(frozen=True)
class Workload:
    """Sizes that decide the cost of one video on one guidance branch.

    Attributes:
      num_tokens: N.
      width: H.
      kinds: of blocks.

    Raises:
      Refusal: a size that is none.
    """

    num_tokens: int
    width: int
    kinds: tuple[BlockSizes, ...]

    def __post_init__(self):
        checks.whole("num_tokens", self.num_tokens, 1, LARGEST)
        checks.whole("width", self.width, 1, LARGEST)
        kinds = self.kinds if isinstance(self.kinds, tuple) else ()
        if not kinds or not all(isinstance(kind, BlockSizes) for kind in kinds):
            raise Refusal(f"kinds must be BlockSizes, one or more; got {checks.shown(self.kinds)}")
        for kind in self.kinds:
            for name in ("number", "ffn_width", "text_tokens", "keys"):
                checks.whole(name, getattr(kind, name), 1, LARGEST)
            checks.whole("groups", kind.groups, 1, self.num_tokens, unit="(the tokens)")

    @property
    def num_blocks(self) -> int:
        """Of all kinds, L."""
        return sum(kind.number for kind in self.kinds)

    def rows_at(self, level: int) -> int:
        """Tokens computed at `level` (0..10) in each block of the first kind."""
        return rows_at(level, self.num_tokens, self.kinds[0].groups)


def block_flops(workload: Workload, kind: BlockSizes, rows: float) -> dict[str, float]:
    """One block when `rows` tokens are computed, by its parts; the text's own not counted.

    Beside the parts "keys_values" are the projections of all tokens, which no budget reduces.
    """
    if not rows:
        return dict.fromkeys(("keys_values", *kind.parts), 0.0)
    width = workload.width
    projections = 4.0 * rows * width**2
    attention = projections + 4.0 * rows * kind.keys * width
    mlp = 4.0 * rows * width * kind.ffn_width
    each = {
        "self": attention,
        "cross": projections + 4.0 * rows * kind.text_tokens * width,
        "mlp": mlp,
        "fused": attention + mlp,
    }
    shared = 4.0 * workload.num_tokens * width**2
    return {"keys_values": shared} | {part: each[part] for part in kind.parts}


def text_flops(workload: Workload) -> float:
    """Keys and values of the text in every block that attends to it, on one branch."""
    kinds = [kind for kind in workload.kinds if "cross" in kind.parts]
    return sum(4.0 * kind.text_tokens * workload.width**2 * kind.number for kind in kinds)


def step_flops(workload: Workload, level: int, *, reused: tuple[str, ...] = ()) -> float:
    """One step on one branch at a level.

    Args:
      workload: sizes.
      level: tenths of the tokens computed in every block, 0..10.
      reused: parts that are not run, as "cross" of every kind or "spatial.self" of one.
    """
    total = 0.0
    for kind in workload.kinds:
        rows = rows_at(level, workload.num_tokens, kind.groups)
        run = {p: 0.0 if {p, f"{kind.name}.{p}"} & set(reused) else 1.0 for p in kind.parts}
        total += kind.number * _run_parts(workload, kind, rows, run)
    return total


def traced_flops(workload: Workload, trace: Any) -> list[float]:
    """Each step on one branch, by what a trace says was computed (`denoise(..., trace=True)`)."""
    computed = np.asarray(trace.computed, np.float64)
    rows = computed.reshape(len(computed), -1).mean(axis=1) * workload.num_tokens
    steps = []
    for index, each in enumerate(rows):
        run = {part: float(share[index]) for part, share in trace.parts.items()}
        kinds = [(kind, _run_parts(workload, kind, each, run)) for kind in workload.kinds]
        steps.append(sum(kind.number * work for kind, work in kinds))
    return steps


def _run_parts(
    workload: Workload, kind: BlockSizes, rows: float, run: Mapping[str, float]
) -> float:
    """A block of which each part is run to a share."""
    parts = block_flops(workload, kind, rows)
    shared = max([run[part] for part in kind.parts if part in SHARING], default=0.0)
    return parts["keys_values"] * shared + sum(parts[part] * run[part] for part in kind.parts)


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
    total = sum(step_flops(workload, level) for level in computed)
    return branches * (total + text * (len(computed) if text_every_step else 1))


def speedup_bound(workload: Workload, level: int) -> float:
    """How many times faster than dense a step at `level` (1..10) can be, by operations alone."""
    checks.whole("level", level, 1, LEVELS)
    return step_flops(workload, LEVELS) / step_flops(workload, level)
