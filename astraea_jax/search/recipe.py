"""A schedule file: the levels, what they were searched for, and what was measured."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from astraea_jax.checks import Refusal
from astraea_jax.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A schedule with what it is good for.

    Attributes:
      schedule: the levels.
      method: name of the method whose steps they are, as commands know it.
      solver: name of the solver.
      shift: flow shift.
      grid: whose noise levels the solver steps through.
      model: fingerprint of the model, of `astraea_jax.model.fingerprint`.
      quality: measured against the dense video: "psnr" in dB, "mse" of the latents, "prompts"
        that they are means over, and whatever else was measured.
      cost: "budget", the mean share of the tokens; "seconds" and "speedup" where measured.
      version: of the library that wrote it.

    Raises:
      Refusal: a part that is missing or of the wrong kind.
    """

    schedule: Schedule
    method: str
    solver: str
    shift: float
    grid: str
    model: str
    quality: Mapping[str, float]
    cost: Mapping[str, float]
    version: str

    def __post_init__(self):
        for name in ("method", "solver", "grid", "model", "version"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise Refusal(f"expected text for {name!r} of a schedule; got {value!r}")
        if not _number(self.shift) or self.shift <= 0:
            raise Refusal(f"shift of a schedule must be a number above 0; got {self.shift!r}")
        for name in ("quality", "cost"):
            values = getattr(self, name)
            if not isinstance(values, Mapping) or not all(map(_number, values.values())):
                raise Refusal(f"expected numbers by name for {name!r}; got {values!r}")
        stated = self.cost.get("budget", self.schedule.budget)
        if abs(stated - self.schedule.budget) > 1e-6:
            raise Refusal(
                f"the cost says budget {stated:g}, but the levels have {self.schedule.budget:g}"
            )

    def save(self, path: str | os.PathLike) -> None:
        """Writes a schedule file; `Schedule.load` reads it too."""
        about = dataclasses.asdict(self)
        del about["schedule"]
        self.schedule.save(path, **about)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Recipe":
        """Reads what `save` wrote.

        Raises:
          Refusal: no such file, no schedule, or a part that is missing or of the wrong kind.
        """
        schedule = Schedule.load(path)
        content: dict[str, Any] = json.loads(pathlib.Path(path).read_text())
        names = [field.name for field in dataclasses.fields(cls) if field.name != "schedule"]
        missing = [name for name in names if name not in content]
        if missing:
            raise Refusal(f"{path} holds a schedule but not what it is for: it lacks {missing}")
        try:
            return cls(schedule, **{name: content[name] for name in names})
        except ValueError as error:
            raise Refusal(f"{path}: {error}") from error

    def differences(
        self, *, model: str, solver: str, shift: float, grid: str, steps: int
    ) -> list[str]:
        """In what a run differs from what the schedule was searched for; empty when in nothing."""
        said = []
        if model != self.model:
            said.append("another model")
        for name, mine, other in (
            ("solver", self.solver, solver),
            ("shift", self.shift, shift),
            ("grid", self.grid, grid),
            ("steps", self.schedule.steps, steps),
        ):
            if mine != other:
                said.append(f"{name} {mine}, not {other}")
        return said


def is_recipe(path: str | os.PathLike) -> bool:
    """Whether a schedule file says what it is for."""
    Schedule.load(path)
    return "model" in json.loads(pathlib.Path(path).read_text())


def recipes_in(folder: str | os.PathLike) -> list[Recipe]:
    """The recipes of a folder, by name; none where there is no such folder."""
    return [Recipe.load(path) for path in sorted(pathlib.Path(folder).glob("*.json"))]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
