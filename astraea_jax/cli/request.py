"""What `astraea generate` is asked for, and which method and schedule that means."""

import dataclasses
import pathlib
import warnings
from collections.abc import Sequence
from typing import get_args

from astraea_jax import checks, methods, schedule, solvers, video
from astraea_jax.checks import Refusal
from astraea_jax.cli.options import ModelChoice, Sampling
from astraea_jax.methods import Astraea, Dense, Method, StepLevel
from astraea_jax.model import VideoDiT, fingerprint
from astraea_jax.schedule import LEVELS, Schedule
from astraea_jax.search.recipe import Recipe, is_recipe, recipes_in
from astraea_ports.pipeline.plan import check_numbers

Run = tuple[Method, Schedule]
"""How a video is made."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command was asked for; None is the model's default.

    A schedule is a file's: a `Recipe` where the file says what it was searched for.
    """

    prompt: str
    model: ModelChoice
    budget: float | None
    schedule: Schedule | Recipe | None
    method: Method | None
    solver: str
    sampling: Sampling
    seed: int
    size: tuple[int | None, int | None, int | None]
    compare: bool
    show_selection: bool
    output: pathlib.Path

    def check(self) -> None:
        """Holds the options against one another, before a model is opened.

        Raises:
          Refusal: two that contradict each other, one out of range, or no place for the video.
        """
        if self.budget is not None and self.schedule is not None:
            raise Refusal("expected a budget or a schedule file, got both: leave one out")
        if self.sampling.steps is not None:
            schedule.check_steps(self.sampling.steps)
        if self.levels is not None and self.sampling.steps not in (None, self.levels.steps):
            raise Refusal(
                f"the schedule has {self.levels.steps} levels, one a step; got "
                f"{self.sampling.steps} "
                "steps: leave --steps out"
            )
        if self.budget is not None:
            schedule.check_budget(self.budget)
            if isinstance(self.method, Dense) and self.budget < 1:
                raise Refusal(
                    "the dense method computes every token: leave --budget or --method out"
                )
        check_numbers(self.seed, self.sampling.guidance, self.sampling.shift)
        video.check_output(self.output)

    @property
    def named_method(self) -> Method | None:
        """The method that the command or its schedule file names, if either does."""
        if self.method is None and isinstance(self.schedule, Recipe):
            return methods.make(self.schedule.method)
        return self.method

    @property
    def levels(self) -> Schedule | None:
        """The levels of the schedule file, if there is one."""
        return self.schedule.schedule if isinstance(self.schedule, Recipe) else self.schedule


def read_schedule(path: pathlib.Path) -> Schedule | Recipe:
    """A schedule file's levels, with what they were searched for where it says so.

    Raises:
      Refusal: no such file or schedule, or it was searched for what is not known here.
    """
    if not is_recipe(path):
        return Schedule.load(path)
    recipe = Recipe.load(path)
    for name, known in (
        ("method", tuple(methods.METHODS)), ("solver", tuple(solvers.SOLVERS)),
        ("grid", get_args(solvers.Grid)),
    ):  # fmt: skip
        checks.one_of(f"{path}: {name}", getattr(recipe, name), known)
    return recipe


class Choice:
    """The runs of a request: what it names, or what was searched for the model it is made with.

    A searched schedule is good for the weights that it was searched on, so the last word falls
    when these are there; all that can be refused is refused before.

    Args:
      request: checked.
      pipeline: the model; its weights need not be there.

    Raises:
      Refusal: a schedule in the model's folder that can't be read.
    """

    def __init__(self, request: Request, pipeline):
        self.request, self.pipeline = request, pipeline
        given = request.levels
        steps = request.sampling.steps or pipeline.defaults.steps
        self.steps = steps if given is None else given.steps
        self.recipes = _candidates(request, pipeline)
        # Without any the weights have no say, and what can't be done is refused now.
        self._known = None if self.recipes else plan(request, self.steps)

    def __call__(self, transformer: VideoDiT) -> list[Run]:
        """The dense run where it is compared with, then the one that is asked for."""
        chosen = self._known
        if chosen is None:
            chosen = plan(self.request, self.steps, self.suitable(transformer))
        return [*([(Dense(), Schedule.dense(self.steps))] if self.request.compare else []), chosen]

    def suitable(self, transformer: VideoDiT) -> list[Recipe]:
        """The candidates that were searched for these weights, this solver and these steps.

        Warns where the schedule that the request names was searched for something else.
        """
        if not self.recipes:
            return []
        request, pipeline = self.request, self.pipeline
        asked = request.sampling
        run = {
            "model": fingerprint(transformer),
            "solver": request.solver,
            "shift": pipeline.shift if asked.shift is None else asked.shift,
            "grid": pipeline.grid if asked.grid is None else asked.grid,
            "steps": self.steps,
            "guidance": (pipeline.defaults.guidance if asked.guidance is None else asked.guidance),
            "negative_prompt": asked.negative_prompt,
        }
        if isinstance(request.schedule, Recipe):
            differences = request.schedule.differences(**run)
            if differences:
                warnings.warn(
                    f"the schedule was searched for {' and '.join(differences)}: its measured "
                    "quality does not hold here",
                    stacklevel=2,
                )
        return [recipe for recipe in self.recipes if not recipe.differences(**run)]


def _candidates(request: Request, pipeline) -> list[Recipe]:
    """Searched schedules that may be what is asked for, if they suit the weights."""
    if isinstance(request.schedule, Recipe):
        return [request.schedule]
    if request.budget is None or request.method is not None or pipeline.folder is None:
        return []
    found = recipes_in(pipeline.folder / "schedules")
    return [each for each in found if abs(each.schedule.budget - request.budget) < 1e-6]


def plan(request: Request, steps: int, recipes: Sequence[Recipe] = ()) -> Run:
    """The method and schedule that a request asks for, or those that measured best.

    With a budget and no method, a searched schedule among `recipes`; where there is none, whole
    steps are skipped: the best of the table in the README. A schedule file that holds levels
    between 0 and 10 and names no method needs ASTRAEA's selection.
    """
    method, levels = request.named_method, request.levels
    if levels is not None:
        whole = set(levels.levels) <= {0, LEVELS}
        return method or (SKIPPING if whole else Astraea()), levels
    if request.budget is None:
        return method or Dense(), Schedule.dense(steps)
    if method is None and recipes:
        return methods.make(recipes[0].method), recipes[0].schedule
    method = method or SKIPPING
    whole = isinstance(method, StepLevel)
    return method, Schedule.for_budget(steps, request.budget, whole_steps=whole)


SKIPPING = StepLevel(corrects=True)
"""What skips whole steps unless another method is asked for."""
