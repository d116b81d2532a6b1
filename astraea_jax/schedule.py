"""A schedule: what share of the tokens each denoising step computes."""

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from astraea_jax import checks, files
from astraea_jax.checks import Refusal, shown

LEVELS = 10
"""Levels are tenths: level 10 computes every token, level 0 computes nothing."""

MOST_STEPS = 10_000
"""Far beyond any use: models tell a thousand noise levels apart."""

_FORMAT = "astraea-schedule-1"

_LONGEST = 10_000
"""Levels of a file that is read."""

_FIELDS = {
    "format": checks.OneOf((_FORMAT,)),
    "steps": checks.Whole(1, _LONGEST),
    "levels": checks.ListOf(checks.Whole(0, LEVELS), 1, _LONGEST),
}
"""What a schedule file says; others may stand beside."""


def rows_per_level(num_tokens: int) -> int:
    """Tokens that one level stands for: a tenth of `num_tokens`, rounded up.

    One definition serves every driver, so that they select the same tokens.
    """
    return -(-num_tokens // LEVELS)


def rows_at(level: int, num_tokens: int) -> int:
    """Tokens computed at `level` (0..10) of `num_tokens`."""
    return min(num_tokens, level * rows_per_level(num_tokens))


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A level for each denoising step, the noisiest step first.

    Attributes:
      levels: integers in 0..10, one a step. 10 is the plain dense model, 0 reuses the last
        velocity and costs nothing. The first is 10: there is nothing yet to reuse.

    Raises:
      Refusal: a level out of range, no step, or a first step that is not dense.

    Source: ASTRAEA 3.3, equation 7.
    """

    levels: tuple[int, ...]

    def __post_init__(self):
        if not self.levels:
            raise Refusal("levels must hold one integer a step; got none")
        for index, level in enumerate(self.levels):
            if isinstance(level, bool) or not isinstance(level, int | np.integer):
                raise Refusal(
                    f"levels must be integers in 0..{LEVELS}; level {index + 1} is {level!r}"
                )
            if not 0 <= level <= LEVELS:
                raise Refusal(
                    f"levels must be integers in 0..{LEVELS}; level {index + 1} is {level}"
                )
        object.__setattr__(self, "levels", tuple(int(level) for level in self.levels))
        if self.levels[0] != LEVELS:
            raise Refusal(
                f"the first level must be {LEVELS} (there is nothing yet to reuse); "
                f"got {self.levels[0]}"
            )

    @property
    def steps(self) -> int:
        """Number of denoising steps."""
        return len(self.levels)

    @property
    def budget(self) -> float:
        """Mean share of the tokens that is computed, in (0, 1]."""
        return sum(self.levels) / (LEVELS * self.steps)

    def realised_budget(self, num_tokens: int) -> float:
        """Mean share of `num_tokens` tokens computed, after rounding a level up to whole rows."""
        rows = sum(rows_at(level, num_tokens) for level in self.levels)
        return rows / (num_tokens * self.steps)

    def array(self) -> np.ndarray:
        """The levels as data for a jitted loop, int8 [T]."""
        return np.asarray(self.levels, np.int8)

    @classmethod
    def dense(cls, steps: int) -> "Schedule":
        """Every token at every step."""
        return cls((LEVELS,) * check_steps(steps))

    @classmethod
    def uniform(cls, steps: int, budget: float, *, dense_steps: int = 1) -> "Schedule":
        """A dense start, then the rest of `budget` spread evenly over the steps that follow.

        Args:
          steps: number of denoising steps.
          budget: mean share of tokens computed, in (0, 1]; met to the nearest tenth of a step.
          dense_steps: leading steps at level 10.

        Raises:
          Refusal: a budget out of (0, 1] or too small for the dense start.
        """
        rest = _after_dense_start(steps, budget, dense_steps, unit=1)
        return cls((LEVELS,) * dense_steps + tuple(_spread(rest, steps - dense_steps)))

    @classmethod
    def skipping(
        cls, steps: int, budget: float, *, dense_steps: int = 1, early: bool = False
    ) -> "Schedule":
        """A dense start, then whole steps computed or skipped, evenly spread.

        Args:
          steps: number of denoising steps.
          budget: mean share of steps computed, in (0, 1]; met to the nearest whole step.
          dense_steps: leading steps at level 10.
          early: each computed step comes before the ones that reuse it, (10, 0, 0) repeated;
            otherwise a run of reuse comes first and the last step is computed.

        Raises:
          Refusal: a budget out of (0, 1] or too small for the dense start.
        """
        rest = _after_dense_start(steps, budget, dense_steps, unit=LEVELS)
        number, length = rest // LEVELS, steps - dense_steps
        tail = [LEVELS * computed for computed in _spread(number, length)]
        if early:
            first = {length * index // number for index in range(number)}
            tail = [LEVELS * (index in first) for index in range(length)]
        return cls((LEVELS,) * dense_steps + tuple(tail))

    @classmethod
    def for_budget(cls, steps: int, budget: float, *, whole_steps: bool) -> "Schedule":
        """The better of the hand-made patterns: a fifth of the steps dense, the rest spread.

        Of whole steps the first of each gap is computed: measured 1 to 3 dB better than the last.

        Args:
          steps: number of denoising steps.
          budget: mean share of tokens computed, in (0, 1].
          whole_steps: steps are computed or skipped; otherwise any level.
        """
        computed = check_budget(budget) * check_steps(steps)
        dense_steps = max(1, min(steps // 5, int(computed * 2 / 3)))
        if whole_steps:
            return cls.skipping(steps, budget, dense_steps=dense_steps, early=True)
        return cls.uniform(steps, budget, dense_steps=dense_steps)

    def save(self, path: str | os.PathLike, **about) -> None:
        """Writes the schedule as JSON; `about` (JSON values) is stored beside the levels.

        Raises:
          Refusal: a path that can't be written, or `about` that is no JSON or would replace what
            the file says itself.
        """
        taken = [name for name in about if name in _FIELDS]
        if taken:
            raise Refusal(f"a schedule file says {', '.join(taken)} itself: choose other names")
        content = {"format": _FORMAT, "steps": self.steps, "levels": list(self.levels), **about}
        try:
            text = json.dumps(content, indent=1, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise Refusal(
                f"expected JSON values beside the levels ({files.reason(error)}): convert them"
            ) from error
        path = files.check_output(path, (".json",))
        with files.replacing(path) as partial:
            partial.write_text(text + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Schedule":
        """Reads what `save` wrote.

        Raises:
          Refusal: no such file, no JSON, another format, or levels that are no schedule.
        """
        return cls.read(path)[0]

    @classmethod
    def read(cls, path: str | os.PathLike) -> tuple["Schedule", dict[str, Any]]:
        """Reads what `save` wrote: the schedule, and what is stored beside it, unchecked.

        Raises:
          Refusal: as `load`.
        """
        content = files.read_json(path, what="schedule file (JSON)")
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise Refusal(f'expected {path} to hold "format": "{_FORMAT}"; write it with save')
        known = checks.fields(
            content, _FIELDS, name=os.fspath(path), required=("levels",), others=True
        )
        try:
            schedule = cls(tuple(known["levels"]))
        except Refusal as error:
            raise Refusal(f"{path}: {error}") from error
        if known.get("steps", schedule.steps) != schedule.steps:
            raise Refusal(f"{path} says {known['steps']} steps but holds {schedule.steps} levels")
        return schedule, {name: content[name] for name in content if name not in _FIELDS}


def check_steps(steps: int) -> int:
    """Returns `steps` if it is a number of steps, 1..10000; raises Refusal otherwise."""
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
        raise Refusal(f"steps must be an integer of at least 1; got {shown(steps)}")
    if steps > MOST_STEPS:
        raise Refusal(f"steps must be at most {MOST_STEPS}; got {shown(steps)}")
    return int(steps)


def check_budget(budget: float) -> float:
    """Returns `budget` if it is a share in (0, 1]; raises Refusal otherwise."""
    try:
        value = float(budget)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 < value <= 1:
        raise Refusal(f"budget must be a number above 0 and at most 1, as 0.5; got {budget!r}")
    return value


def _after_dense_start(steps: int, budget: float, dense_steps: int, *, unit: int) -> int:
    """Tenths of steps left to spread after the dense start, a multiple of `unit`."""
    check_steps(steps)
    check_budget(budget)
    if not 1 <= dense_steps <= steps:
        raise Refusal(f"dense_steps must be in 1..{steps} (the steps); got {dense_steps}")
    rest = round(budget * LEVELS * steps / unit) * unit - LEVELS * dense_steps
    if rest < 0:
        raise Refusal(
            f"budget {budget:g} of {steps} steps is less than their {dense_steps} dense steps: "
            f"ask for at least {dense_steps / steps:.3g}"
        )
    return rest


def _spread(total: int, steps: int) -> Sequence[int]:
    """Whole numbers that add up to `total`, as equal as can be, the larger ones evenly spaced.

    A step's number is large late in its share of the run, so a skipping schedule reuses before
    it computes and ends on a computed step.
    """
    marks = [total * index // steps for index in range(steps + 1)] if steps else [0]
    return [after - before for before, after in itertools.pairwise(marks)]
