"""Schedules without a stochastic search: what each step is worth, and how to spend a budget.

A sensitivity curve says how far the video moves when one step alone is computed less (Figure 5).
If the damage of several steps were the sum of their own, dynamic programming over the curve would
find the best schedule; skips compound, so it is a start, which a few local swaps then mend.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from astraea_jax import checks
from astraea_jax.checks import Refusal
from astraea_jax.schedule import LEVELS, Schedule
from astraea_jax.search.space import MOST_STEPS, Space

Fitness = Callable[[np.ndarray], np.ndarray]
"""Levels int8 [S, T] -> fitness [S], as `scoring.Evaluator`."""


def step_sensitivity(
    fitness: Fitness, steps: int, *, dense_start: int = 1
) -> Float[np.ndarray, "T"]:
    """Fitness when one step alone is skipped; 0 for the pinned ones. Costs T evaluations.

    Source: ASTRAEA Figure 5.
    """
    return level_sensitivity(fitness, steps, (0,), dense_start=dense_start)[:, 0]


def level_sensitivity(
    fitness: Fitness, steps: int, levels: tuple[int, ...], *, dense_start: int = 1
) -> Float[np.ndarray, "T G"]:
    """Fitness when one step alone runs at each of some levels; 0 at level 10.

    Raises:
      Refusal: steps or levels that are none, or a dense start of no step or more than all.
    """
    checks.whole("steps", steps, 1, MOST_STEPS)
    checks.whole("dense_start", dense_start, 1, steps, unit="(the steps)")
    problem = checks.ListOf(checks.Whole(0, LEVELS), 1, LEVELS + 1).problem(levels)
    if problem is not None:
        raise Refusal(f"levels {problem}")
    damage = np.zeros((steps, len(levels)))
    places, rows = [], []
    for step in range(dense_start, steps):
        for column, level in enumerate(levels):
            if level != LEVELS:
                row = np.full(steps, LEVELS, np.int8)
                row[step] = level
                rows.append(row)
                places.append((step, column))
    if rows:
        damage[tuple(np.transpose(places))] = fitness(np.array(rows, np.int8))
    return damage


def interpolated(
    damage: Float[np.ndarray, "T G"], levels: tuple[int, ...], choices: tuple[int, ...]
) -> Float[np.ndarray, "T C"]:
    """Damage at every choice from some measured levels, linear in the root of the damage.

    An error that grows in proportion to what is left out has a squared error that grows with its
    square; with level 0 alone measured this is damage * (1 - level / 10) ** 2.
    """
    known = sorted({*levels, LEVELS})
    roots = np.zeros((len(damage), len(known)))
    for column, level in enumerate(levels):
        roots[:, known.index(level)] = np.sqrt(damage[:, column])
    roots[:, known.index(LEVELS)] = 0.0
    return np.square([np.interp(choices, known, row) for row in roots])


def allocate(space: Space, damage: Float[np.ndarray, "T C"]) -> Schedule:
    """The schedule of least summed damage whose cost lies in the band, by dynamic programming.

    Args:
      space: where to look.
      damage: of each step at each of the space's choices, at least 0.

    Raises:
      Refusal: another shape, or no finite number in it.
    """
    shape = (space.steps, len(space.choices))
    if checks.array("damage", damage, f"of shape {shape}").shape != shape:
        raise Refusal(f"damage must be an array of shape {shape}; got {damage.shape}")
    if not np.isfinite(damage).any():
        raise Refusal("expected damage of each step; got no finite number: is the model's NaN?")
    damage = np.where(np.isfinite(damage), damage, np.nanmax(damage[np.isfinite(damage)]) * 1e6)
    least = np.full(space.high + 1, np.inf)
    least[0] = 0.0
    chosen = np.zeros((space.steps, space.high + 1), np.int8)
    for step in range(space.steps):
        after = np.full_like(least, np.inf)
        for gene, cost in enumerate(space.costs):
            pinned = step < space.dense_start and gene != len(space.costs) - 1
            if pinned or cost > space.high:
                continue
            reached = np.full_like(least, np.inf)
            reached[cost:] = least[: space.high + 1 - cost] + damage[step, gene]
            better = reached < after
            after[better] = reached[better]
            chosen[step, better] = gene
        least = after
    total = space.low + int(np.argmin(least[space.low :]))
    genes = np.zeros(space.steps, np.int8)
    for step in reversed(range(space.steps)):
        genes[step] = chosen[step, total]
        total -= space.costs[genes[step]]
    return space.schedule(genes)


def refine(
    space: Space,
    fitness: Fitness,
    first: Schedule,
    evaluations: int,
    *,
    seed: int = 0,
    batch: int = 32,
) -> tuple[Schedule, int]:
    """Local swaps that keep the cost in the band, from a schedule, for so many evaluations.

    A swap takes one step up and another down; swaps of near steps are tried first as often as
    far ones. Each batch of untried neighbours of the best schedule is scored together.

    Args:
      space: where to look.
      fitness: lower is better.
      first: where to start; in the space.
      evaluations: at most so many.
      seed: of the order in which swaps are tried.
      batch: neighbours scored together.

    Returns:
      The best schedule, and the evaluations that were spent.

    Raises:
      Refusal: a schedule that is not in the space, or a number out of range.
    """
    for name, value, low, high in (
        ("evaluations", evaluations, 1, 1_000_000),
        ("batch", batch, 1, 1_000_000),
        ("seed", seed, 0, 2**32 - 1),
    ):
        checks.whole(name, value, low, high)
    rng = np.random.default_rng(seed)
    best = space.genes(first)
    lowest = float(fitness(space.levels(best)[None])[0])
    spent, tried = 1, {best.tobytes()}
    while spent < evaluations:
        new = [row for row in _neighbours(space, best) if row.tobytes() not in tried]
        if not new:
            break
        rng.shuffle(new)
        new = np.array(new[: min(batch, evaluations - spent)])
        tried |= {row.tobytes() for row in new}
        found = fitness(space.levels(new))
        spent += len(new)
        if found.min() < lowest:
            lowest, best = float(found.min()), new[int(found.argmin())]
    return space.schedule(best), spent


def _neighbours(space: Space, genes: Int[np.ndarray, "T"]) -> list[np.ndarray]:
    """Genes that differ by a swap: one step goes up, one down, by one choice or all the way."""
    top, rows = len(space.choices) - 1, {}
    free = range(space.dense_start, space.steps)
    for up in free:
        for down in free:
            if up == down:
                continue
            for change in {1, top}:
                row = genes.copy()
                row[up] = min(top, row[up] + change)
                row[down] = max(0, row[down] - change)
                if (row != genes).any() and space.holds(row):
                    rows[row.tobytes()] = row
    return list(rows.values())
