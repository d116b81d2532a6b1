"""Which schedules a search may look at: levels, what each costs, and a budget band."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from astraea_jax import checks
from astraea_jax.checks import Refusal
from astraea_jax.schedule import LEVELS, Schedule, check_budget, check_steps

ALL_LEVELS = tuple(range(LEVELS + 1))
"""Any share of the tokens at any step."""

WHOLE_STEPS = (0, LEVELS)
"""Steps computed or skipped."""


MOST_STEPS = 1000
"""Denoising steps of a search: models know no more noise levels."""

MOST_COST = 1_000_000
"""Of a step: dynamic programming has a column for every cost of a schedule."""


@dataclasses.dataclass(frozen=True)
class Space:
    """Schedules of one length whose cost lies in a band. A gene is an index into `choices`.

    Attributes:
      steps: denoising steps, T.
      choices: the levels that a step may take, rising; the last is 10.
      costs: what each choice costs, whole numbers that never fall.
      low: least total cost.
      high: largest total cost.
      dense_start: leading steps that are pinned at level 10, at least 1.

    Raises:
      Refusal: choices or costs that do not fit, or a band that no schedule reaches; the
        message says what can be reached.

    Source: ASTRAEA 3.3, equation 7.
    """

    steps: int
    choices: tuple[int, ...]
    costs: tuple[int, ...]
    low: int
    high: int
    dense_start: int = 1

    def __post_init__(self):
        checks.whole("steps", self.steps, 1, MOST_STEPS)
        lists = {"choices": (self.choices, LEVELS), "costs": (self.costs, MOST_COST)}
        for name, (values, most) in lists.items():
            checks.hold(name, values, checks.ListOf(checks.Whole(-most, most), 0, 2 * LEVELS))
        for name in ("low", "high"):
            checks.whole(name, getattr(self, name), -(1 << 40), 1 << 40)
        rising = all(a < b for a, b in zip(self.choices, self.choices[1:], strict=False))
        if len(self.choices) < 2 or not rising or self.choices[0] < 0 or self.choices[-1] != LEVELS:
            raise Refusal(f"choices must be rising levels up to {LEVELS}; got {self.choices}")
        if len(self.costs) != len(self.choices) or min(self.costs) < 0:
            raise Refusal(
                f"expected a cost of at least 0 for each of {len(self.choices)} choices; "
                f"got {self.costs}"
            )
        for cost in self.costs:
            checks.whole("a cost", cost, 0, MOST_COST)
        checks.whole("dense_start", self.dense_start, 1, self.steps, unit="(the steps)")
        # No schedule costs more than the dense one: bits beyond it would only take memory.
        most = self.costs[-1] * self.steps
        low, high = max(self.low, 0), min(self.high, most)
        wanted = (1 << max(high - low + 1, 0)) - 1
        if low > most or not (self._reachable >> low) & wanted:
            raise Refusal(self._unreachable())

    @classmethod
    def for_budget(
        cls,
        steps: int,
        budget: float,
        *,
        choices: Sequence[int] = ALL_LEVELS,
        band: tuple[float, float] = (1.0, 1.0),
        dense_start: int = 1,
    ) -> "Space":
        """Schedules whose mean level is `budget`, within `band` times it.

        Args:
          steps: denoising steps.
          budget: mean share of the tokens, in (0, 1].
          choices: levels that a step may take.
          band: least and largest share of the budget; (1, 1) is exact, the paper has (0.9, 1.1).
          dense_start: leading dense steps.
        """
        total = check_budget(budget) * LEVELS * check_steps(steps)
        low, high = check_band(band)
        problem = checks.ListOf(checks.Whole(0, LEVELS), 2, LEVELS + 1).problem(choices)
        if problem is not None:
            raise Refusal(f"choices {problem}")
        costs = tuple(int(level) for level in choices)
        if low == high:
            least = most = round(low * total)
        else:  # rounded first: 0.3 * 30 * 10 is a little below 90
            least, most = math.ceil(round(low * total, 6)), math.floor(round(high * total, 6))
        return cls(steps, costs, costs, least, most, dense_start)

    @classmethod
    def for_costs(
        cls,
        steps: int,
        costs: Sequence[float],
        limit: float,
        *,
        choices: Sequence[int] = ALL_LEVELS,
        band: float = 0.9,
        dense_start: int = 1,
    ) -> "Space":
        """Schedules whose measured cost is at most `limit`, and at least `band` of it.

        Args:
          steps: denoising steps.
          costs: of a step at each choice, as seconds; made to rise where noise makes them fall.
          limit: of the whole run, in the same unit.
          choices: levels that a step may take.
          band: share of the limit that is used at least, in (0, 1].
          dense_start: leading dense steps.
        """
        steps = check_steps(steps)
        checks.number("limit", limit, 0, 1e12, above=True)
        problem = checks.ListOf(checks.Number(0, 1e12), 1, LEVELS + 1).problem(_listed(costs))
        if problem is not None:
            raise Refusal(f"costs {problem}")
        if not max(costs) > 1e-12:
            raise Refusal(f"expected costs of which the last is above 1e-12; got {costs}")
        rising = np.maximum.accumulate(np.asarray(costs, np.float64))
        unit = rising[-1] / 1000
        whole = tuple(round(float(cost / unit)) for cost in rising)
        total = limit / unit
        high = min(math.floor(total), whole[-1] * steps)
        checks.number("band", band, 0, 1, above=True)
        low = min(math.ceil(band * total), high)
        return cls(steps, tuple(choices), whole, low, high, dense_start)

    @property
    def band(self) -> np.ndarray:
        """Least and largest total cost, int32 [2]: the band as data."""
        return np.array([self.low, self.high], np.int32)

    def without_band(self) -> "Space":
        """The same levels at any cost: what a compiled program is made for."""
        return dataclasses.replace(self, low=0, high=self.costs[-1] * self.steps)

    @property
    def free_steps(self) -> int:
        """Steps that are not pinned."""
        return self.steps - self.dense_start

    @functools.cached_property
    def number(self) -> int:
        """How many schedules lie in the space; 1000 where there are more."""
        ways = np.zeros(self.costs[-1] * self.steps + 1)
        ways[self.costs[-1] * self.dense_start] = 1
        for _ in range(self.free_steps):
            ways = np.minimum(
                sum(np.pad(ways, (cost, 0))[: len(ways)] for cost in self.costs), 1000
            )
        return int(min(ways[max(self.low, 0) : self.high + 1].sum(), 1000))

    def too_small(self, number: int) -> str:
        """What is said of a space that holds so few schedules that there is nothing to search."""
        return (
            f"the space holds {number} schedule(s) of {self.steps} steps and cost "
            f"{self.low}..{self.high}: there is nothing to search; widen the band"
        )

    def cost(self, genes: np.ndarray) -> np.ndarray:
        """Total cost of each row of genes [..., T]."""
        return np.asarray(np.asarray(self.costs)[np.asarray(genes)].sum(axis=-1))

    def holds(self, genes: np.ndarray) -> np.ndarray:
        """Which rows of genes [..., T] lie in the space."""
        genes = np.asarray(genes)
        cost = self.cost(genes)
        pinned = (genes[..., : self.dense_start] == len(self.choices) - 1).all(axis=-1)
        return np.asarray((self.low <= cost) & (cost <= self.high) & pinned)

    def schedule(self, genes: np.ndarray) -> Schedule:
        """The schedule of one row of genes."""
        return Schedule(tuple(int(level) for level in np.asarray(self.choices)[np.asarray(genes)]))

    def levels(self, genes: np.ndarray) -> np.ndarray:
        """The levels of genes, int8 of the same shape."""
        return np.asarray(self.choices, np.int8)[np.asarray(genes)]

    def genes(self, schedule: Schedule) -> np.ndarray:
        """The genes of a schedule, int8 [T].

        Raises:
          Refusal: a schedule that is not in the space.
        """
        if not isinstance(schedule, Schedule):
            raise Refusal(f"expected a Schedule; got {checks.shown(schedule)}")
        if schedule.steps != self.steps:
            raise Refusal(f"expected a schedule of {self.steps} levels; got {schedule.steps}")
        strange = set(schedule.levels) - set(self.choices)
        if strange:
            raise Refusal(f"expected levels among {self.choices}; got {sorted(strange)}")
        genes = np.array([self.choices.index(level) for level in schedule.levels], np.int8)
        if not self.holds(genes):
            raise Refusal(
                f"expected {self.dense_start} dense steps and a cost in {self.low}..{self.high}; "
                f"got {schedule.levels}, which costs {int(self.cost(genes))}"
            )
        return genes

    @functools.cached_property
    def _reachable(self) -> int:
        """Bit c is set when some schedule costs c."""
        sums = 1 << (self.costs[-1] * self.dense_start)
        for _ in range(self.free_steps):
            sums = functools.reduce(lambda total, cost: total | (sums << cost), set(self.costs), 0)
        return sums

    def _unreachable(self) -> str:
        """What the error says: the nearest costs that can be reached, as shares of dense."""
        dense = self.costs[-1] * self.steps
        bits = reversed(f"{self._reachable:b}")
        reachable = [cost for cost, bit in enumerate(bits) if bit == "1"]
        below = [cost for cost in reachable if cost < self.low]
        above = [cost for cost in reachable if cost > self.high]
        near = [cost / dense for cost in (*below[-1:], *above[:1])]
        return (
            f"no schedule of {self.steps} steps with levels {self.choices} and {self.dense_start} "
            f"dense at the start costs {self.low / dense:.4g} to {self.high / dense:.4g} of dense; "
            f"the nearest are {' and '.join(f'{share:.4g}' for share in near)}, and all lie in "
            f"{reachable[0] / dense:.4g} to {reachable[-1] / dense:.4g}: change the budget or "
            "widen the band"
        )


def check_band(band: tuple[float, float]) -> tuple[float, float]:
    """Returns the band if it is 0 < low <= high; raises Refusal otherwise."""
    problem = checks.ListOf(checks.Number(0, 100, above=True), 2, 2).problem(_listed(band))
    if problem is not None:
        raise Refusal(f"a band must be two shares, 0 < low <= high: it {problem}")
    low, high = map(float, band)
    if low > high:
        raise Refusal(f"a band must be two shares, 0 < low <= high; got {band}")
    return low, high


def _listed(values: Any) -> Any:
    """An array as a list; anything else as it is."""
    return values.tolist() if isinstance(values, np.ndarray) else values
