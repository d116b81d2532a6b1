"""A schedule file: the levels, what they were searched for, and what was measured."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence

from astraea_jax import checks
from astraea_jax.checks import Refusal
from astraea_jax.schedule import Schedule

_NUMBERS = checks.ByName(checks.Number(-1e12, 1e12))

_FIELDS = {
    **dict.fromkeys(("method", "solver", "grid", "model", "version"), checks.Text()),
    "shift": checks.Number(0, 1e4, above=True),
    "quality": _NUMBERS,
    "cost": checks.ByName(checks.Number(0, 1e12)),
    "guidance": checks.OrNone(checks.Number(-1e4, 1e4)),
    "negative_prompt": checks.Text(10_000, empty=True),
    "lora": checks.ListOf(checks.Text(), 0, 100),
    "dtype": checks.Text(empty=True),
    "precision": checks.Text(empty=True),
}
"""What a recipe says beside its levels."""


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
      guidance: scale that it was searched with; None where that is not recorded.
      negative_prompt: what the unconditional branch read.
      lora: the changes that were merged, each as "name:strength digest".
      dtype: of the weights, "" where it is not recorded; so the next.
      precision: what stayed float32 where the dtype is narrower.

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
    guidance: float | None = None
    negative_prompt: str = ""
    lora: Sequence[str] = ()
    dtype: str = ""
    precision: str = ""

    def __post_init__(self):
        if not isinstance(self.schedule, Schedule):
            raise Refusal(f"schedule must be a Schedule; got {checks.shown(self.schedule)}")
        if not isinstance(self.schedule, Schedule):
            raise Refusal(f"schedule must be a Schedule; got {checks.shown(self.schedule)}")
        # As a file would hold them: a recipe that can be made can be read again.
        content = {name: getattr(self, name) for name in _FIELDS}
        checks.fields(content, _FIELDS, name="recipe", advice="give what a schedule is good for")
        object.__setattr__(self, "lora", tuple(self.lora))
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
          Refusal: no such file, no schedule, or a part that is missing, of the wrong kind or not
            known.
        """
        schedule, about = Schedule.read(path)
        missing = [name for name in _REQUIRED if name not in about]
        if missing:
            raise Refusal(f"{path} holds a schedule but not what it is for: it lacks {missing}")
        known = checks.fields(about, _FIELDS, name=os.fspath(path))
        try:
            return cls(schedule, **known)
        except Refusal as error:
            raise Refusal(f"{path}: {error}") from error

    def differences(
        self,
        *,
        model: str,
        solver: str,
        shift: float,
        grid: str,
        steps: int,
        guidance: float | None = None,
        negative_prompt: str = "",
    ) -> list[str]:
        """In what a run differs from what the schedule was searched for; empty when in nothing.

        What the recipe does not record, or a run does not say (None), differs from nothing.
        """
        said = []
        if model != self.model:
            said.append("another model")
        pairs = [
            ("solver", self.solver, solver),
            ("shift", self.shift, shift),
            ("grid", self.grid, grid),
            ("steps", self.schedule.steps, steps),
        ]
        if guidance is not None and self.guidance is not None:
            pairs.append(("guidance", self.guidance, guidance))
            if max(guidance, self.guidance) > 1:
                mine, other = map(checks.shown, (self.negative_prompt, negative_prompt))
                pairs.append(("negative prompt", mine, other))
        said += [f"{name} {mine}, not {other}" for name, mine, other in pairs if mine != other]
        return said


_REQUIRED = [
    field.name
    for field in dataclasses.fields(Recipe)
    if field.name in _FIELDS and field.default is dataclasses.MISSING
]


def is_recipe(path: str | os.PathLike) -> bool:
    """Whether a schedule file says what it is for."""
    return "model" in Schedule.read(path)[1]


def recipes_in(folder: str | os.PathLike) -> list[Recipe]:
    """The recipes of a folder, by name; none where there is no such folder."""
    return [Recipe.load(path) for path in sorted(pathlib.Path(folder).glob("*.json"))]
