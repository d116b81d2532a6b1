"""What a schedule shall cost: a share of the tokens, a speed-up, or seconds on this machine."""

import dataclasses
import os
import pathlib
from typing import Any

import jax

from astraea_jax import checks, files, report
from astraea_jax.checks import Refusal
from astraea_jax.cli.identity import of_weights
from astraea_jax.cli.latency import latency_table
from astraea_jax.cli.subject import Opened, Subject
from astraea_jax.methods import METHODS
from astraea_jax.schedule import LEVELS, check_budget
from astraea_jax.search.space import Space

LATENCY = "latency.json"

Band = tuple[float, float] | None
"""Least and largest cost as shares of the target; None is exact for a budget, .9 to 1 for time."""


@dataclasses.dataclass(frozen=True)
class Target:
    """What the schedule shall cost: one of the three."""

    budget: float | None
    speedup: float | None
    seconds: float | None

    def __post_init__(self):
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            said = ", ".join(f"--{name}" for name in given) or "none"
            raise Refusal(f"expected one of --budget, --speedup, --seconds; got {said}")
        if self.budget is not None:
            check_budget(self.budget)
        if self.speedup is not None:
            checks.number("speedup", self.speedup, 0, 1000, above=True)
        if self.seconds is not None:
            checks.number("seconds", self.seconds, 0, 1e7, above=True)


def budget_space(target: Target, opened: Opened, dense_start: int, band: Band) -> Space | None:
    """The space of a budget; None where the target is a time, for which steps must be timed."""
    steps = opened.solver.steps
    checks.whole("dense_start", dense_start, 1, steps, unit="(the steps)")
    if target.budget is None:
        return None
    space = Space.for_budget(
        steps, target.budget, choices=opened.choices, band=band or (1.0, 1.0),
        dense_start=dense_start,
    )  # fmt: skip
    return _worth_searching(space)


def timed_space(
    target: Target, opened: Opened, table: dict[int, float], dense_start: int, band: Band
) -> Space:
    """The space of a time, by seconds of a step at each level."""
    steps = opened.solver.steps
    limit = target.seconds or steps * table[LEVELS] / (target.speedup or 1)
    low, high = band or (0.9, 1.0)
    space = Space.for_costs(
        steps, [table[level] for level in opened.choices], high * limit,
        choices=opened.choices, band=low / high, dense_start=dense_start,
    )  # fmt: skip
    return _worth_searching(space)


def _worth_searching(space: Space) -> Space:
    if space.number < 2:
        raise Refusal(space.too_small(space.number))
    return space


class Latencies:
    """The table of a model, shape, method and device: measured once, kept in a folder."""

    def __init__(self, folder: pathlib.Path, *, used: bool = True):
        """Reads what the folder holds, if it will be used.

        Raises:
          Refusal: the folder's file is no such table.
        """
        self._path = folder / LATENCY
        self._kept: dict[str, Any] = {"of": {}, "seconds": {}}
        if used and os.path.exists(self._path):
            rules = {
                "of": checks.ByName(checks.Anything()),
                "seconds": checks.ByName(checks.Number(0, 1e6, above=True), LEVELS + 1),
            }
            content = files.read_json(self._path, what="table of step times (JSON)")
            self._kept = checks.fields(
                content, rules, name=str(self._path), required=rules, others=True,
                advice="remove the file, and the steps are timed anew",
            )  # fmt: skip
            files.check_output(self._path, (".json",))

    def table(self, subject: Subject, levels: tuple[int, ...], **weights) -> dict[int, float]:
        """Seconds of a step at each level, kept or measured now; `weights` as of `of_weights`."""
        key = latency_key(subject, **weights)
        kept = self._kept["seconds"]
        if self._kept["of"] == key and {*map(str, levels)} <= {*kept}:
            return {level: float(kept[str(level)]) for level in levels}
        seconds = latency_table(
            subject.pipeline, subject.size, METHODS[subject.method], levels,
            guidance=subject.guidance or 0.0, context=subject.part(slice(1)).context,
        )  # fmt: skip
        self._kept = {"of": key, "seconds": {str(key): value for key, value in seconds.items()}}
        return seconds

    def keep(self) -> None:
        """Writes the table into the folder."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        report.write_json(self._path, {**self._kept, **report.environment()})


def latency_key(subject: Subject, **weights) -> dict[str, Any]:
    """What the time of a step depends on."""
    return {
        **of_weights(subject, **weights),
        "size": list(subject.size),
        "method": repr(METHODS[subject.method]),
        "guided": subject.guidance is not None,
        "device": jax.devices()[0].device_kind,
    }
