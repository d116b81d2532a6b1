"""A schedule: what share of the tokens each denoising step computes."""

import dataclasses
import itertools
import json
import os
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from astraea_jax import checks, files
from astraea_jax.checks import Refusal

LEVELS = 10
"""Levels are tenths: level 10 computes every token, level 0 computes nothing."""

MOST_STEPS = 10_000
"""Steps of the longest run; a budget is at least one step of it."""

MOST_TOKENS = 1 << 31
"""Of a video: positions are 32 bits."""

_FORMAT = "astraea-schedule-1"

_PACKAGE = str(pathlib.Path(__file__).parent)

_FIELDS = {
    "format": checks.OneOf((_FORMAT,)),
    "steps": checks.Whole(1, MOST_STEPS),
    "levels": checks.ListOf(checks.Whole(0, LEVELS), 1, MOST_STEPS),
}
"""What a schedule file says; others may stand beside."""


def rows_per_level(num_tokens: int, groups: int = 1) -> int:
    """Tokens that one level stands for: a tenth of each group, rounded up.

    One definition serves the selection, every driver, and what budgets and operations book.

    Args:
      num_tokens: tokens of a video.
      groups: groups of as many tokens each that attend within themselves, and that must have
        equally many rows; 1 where all tokens attend to all.
    """
    return groups * -(-(num_tokens // groups) // LEVELS)


def rows_at(level: int, num_tokens: int, groups: int = 1) -> int:
    """Tokens computed at `level` (0..10) of `num_tokens` in so many groups."""
    return min(num_tokens, level * rows_per_level(num_tokens, groups))


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
        object.__setattr__(self, "levels", check_levels(self.levels))

    @property
    def steps(self) -> int:
        """Number of denoising steps."""
        return len(self.levels)

    @property
    def budget(self) -> float:
        """Mean share of the tokens that is computed, in (0, 1]."""
        return sum(self.levels) / (LEVELS * self.steps)

    def realised_budget(self, num_tokens: int, groups: Sequence[int] = (1,)) -> float:
        """Mean share of `num_tokens` tokens computed, after rounding a level up to whole rows.

        Args:
          num_tokens: tokens of a video.
          groups: the number of groups in each kind of block (`Groups.number`), whose mean it is.

        Raises:
          Refusal: a number of tokens or groups that is none.
        """
        checks.whole("num_tokens", num_tokens, 1, MOST_TOKENS)
        problem = checks.ListOf(checks.Whole(1, num_tokens), 1, 1000).problem(groups)
        if problem is not None:
            raise Refusal(f"groups {problem}")
        rows = sum(rows_at(level, num_tokens, each) for level in self.levels for each in groups)
        return rows / (num_tokens * self.steps * len(groups))

    def array(self) -> np.ndarray:
        """The levels as data for a jitted loop, int8 [T]."""
        return np.asarray(self.levels, np.int8)

    @classmethod
    def dense(cls, steps: int) -> "Schedule":
        """Every token at every step; Refusal for a number of steps that is none."""
        return cls((LEVELS,) * check_steps(steps))

    @classmethod
    def uniform(cls, steps: int, budget: float, *, dense_steps: int = 1) -> "Schedule":
        """A dense start, then the rest of `budget` spread evenly over the steps that follow.

        Args:
          steps: number of denoising steps.
          budget: mean share of tokens computed, in (0, 1]; met to the nearest tenth of a step,
            with a warning where that is more than a tenth of it away (`check_realised`).
          dense_steps: leading steps at level 10.

        Raises:
          Refusal: a number out of range, or a budget too small for the dense start.
        """
        steps = check_steps(steps)
        rest = _after_dense_start(steps, budget, dense_steps, unit=1)
        schedule = cls((LEVELS,) * dense_steps + tuple(_spread(rest, steps - dense_steps)))
        check_realised(schedule, budget)
        return schedule

    @classmethod
    def skipping(
        cls, steps: int, budget: float, *, dense_steps: int = 1, early: bool = False
    ) -> "Schedule":
        """A dense start, then whole steps computed or skipped, evenly spread.

        Args:
          steps: number of denoising steps.
          budget: mean share of steps computed, in (0, 1]; met to the nearest whole step, with a
            warning where that is more than a tenth of it away (`check_realised`).
          dense_steps: leading steps at level 10.
          early: each computed step comes before the ones that reuse it, (10, 0, 0) repeated;
            otherwise a run of reuse comes first and the last step is computed.

        Raises:
          Refusal: a number out of range, or a budget too small for the dense start.
        """
        steps = check_steps(steps)
        rest = _after_dense_start(steps, budget, dense_steps, unit=LEVELS)
        number, length = rest // LEVELS, steps - dense_steps
        tail = [LEVELS * computed for computed in _spread(number, length)]
        if early:
            first = {length * index // number for index in range(number)}
            tail = [LEVELS * (index in first) for index in range(length)]
        schedule = cls((LEVELS,) * dense_steps + tuple(tail))
        check_realised(schedule, budget)
        return schedule

    @classmethod
    def for_budget(cls, steps: int, budget: float, *, whole_steps: bool) -> "Schedule":
        """The better of the hand-made patterns: a fifth of the steps dense, the rest spread.

        Of whole steps the first of each gap is computed: measured 1 to 3 dB better than the last.

        Args:
          steps: number of denoising steps.
          budget: mean share of tokens computed, in (0, 1]; what comes out is `budget` of the
            schedule, with a warning where it is more than a tenth of it away.
          whole_steps: steps are computed or skipped; otherwise any level.

        Raises:
          Refusal: a number out of range, or a budget of less than one step.
        """
        steps = check_steps(steps)
        computed = check_budget(budget) * steps
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


def check_levels(levels: Any, *, steps: int | None = None, dense_start: int = 1) -> tuple[int, ...]:
    """Returns a schedule's levels as plain integers.

    Args:
      levels: a Schedule, or a list, tuple or array of integers in 0..10, a step each.
      steps: how many there must be; None for any number.
      dense_start: leading levels that must be 10.

    Raises:
      Refusal: a level that is none, another number of them, or a start that is not dense.
    """
    steps_said = "" if steps is None else f", one per step ({steps})"
    expected = f"levels must be integers in 0..{LEVELS}{steps_said}"
    values = levels.levels if isinstance(levels, Schedule) else levels
    if isinstance(values, np.ndarray) or hasattr(values, "__array__"):
        values = np.asarray(values).tolist()
    if not isinstance(values, list | tuple):
        raise Refusal(f"{expected}; got {checks.shown(levels)}")
    problems = []
    if not 1 <= len(values) <= MOST_STEPS or steps not in (None, len(values)):
        problems.append(f"got {len(values)} values")
    each = checks.Whole(0, LEVELS)
    bad = next((i for i, level in enumerate(values) if each.problem(level)), None)
    if bad is not None:
        problems.append(f"level {bad + 1} is {checks.shown(values[bad])}")
    if problems:
        raise Refusal(f"{expected}; {', '.join(problems)}")
    start = [level for level in values[:dense_start] if level != LEVELS]
    if start:
        which = "level" if dense_start == 1 else f"{dense_start} levels"
        raise Refusal(
            f"the first {which} must be {LEVELS} (there is nothing yet to reuse); got {start[0]}"
        )
    return tuple(int(level) for level in values)


def check_steps(steps: int) -> int:
    """Returns `steps` as an int if it is in 1..`MOST_STEPS`; raises Refusal otherwise."""
    return checks.whole("steps", steps, 1, MOST_STEPS)


def check_budget(budget: float) -> float:
    """Returns `budget` as a float if it is a share in 1 / `MOST_STEPS`..1; Refusal otherwise."""
    return checks.number("budget", budget, 1 / MOST_STEPS, 1)


def check_realised(schedule: Schedule, budget: float) -> None:
    """Warns where a schedule's budget is more than a tenth of `budget` away from it.

    The warning points at whoever called the library.
    """
    if abs(schedule.budget - budget) > 0.1 * budget + 1e-9:
        warnings.warn(
            f"a budget of {budget:g} comes out as {schedule.budget:.3g} of {schedule.steps} steps: "
            "take more steps, or a budget that they can meet",
            skip_file_prefixes=(_PACKAGE,),
        )


def _after_dense_start(steps: int, budget: float, dense_steps: int, *, unit: int) -> int:
    """Tenths of steps left to spread after the dense start, a multiple of `unit`."""
    budget = check_budget(budget)
    checks.whole("dense_steps", dense_steps, 1, steps, unit="(the steps)")
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
