"""What a search is made on: a model with prompts, a solver and a method.

First the options are checked, then prompts and configs are read, and only then any weight.
"""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from astraea_jax import checks, files, solvers
from astraea_jax.checks import Refusal
from astraea_jax.cli.options import MOST_PROMPTS, ModelChoice, Sampling, VideoSize
from astraea_jax.methods import METHODS, StepLevel
from astraea_jax.population import Scorer
from astraea_jax.search.space import ALL_LEVELS, MOST_STEPS, WHOLE_STEPS
from astraea_ports import checkpoints
from astraea_ports.pipeline.plan import check_numbers

_CAPTION = checks.Text(10_000)


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the options say of model, prompts and sampling; None is the model's default.

    Attributes:
      model: which.
      prompts: a text file, or None for the captions in the model's folder.
      count: prompts to take, the first of the file.
      method: of `METHODS`.
      solver: its name.
      sampling: steps, noise levels, guidance; 1 or less is none.
      size: of the videos.

    Raises:
      Refusal: a number out of range.
    """

    model: ModelChoice
    prompts: pathlib.Path | None
    count: int
    method: str
    solver: str
    sampling: Sampling
    size: VideoSize

    def __post_init__(self):
        checks.whole("count", self.count, 1, MOST_PROMPTS, unit="prompts")
        checks.one_of("method", self.method, tuple(METHODS))
        checks.one_of("solver", self.solver, tuple(solvers.SOLVERS))
        if self.sampling.steps is not None:
            checks.whole("steps", self.sampling.steps, 1, MOST_STEPS)
        check_numbers(0, self.sampling.guidance, self.sampling.shift)
        self.size.check()

    def open(self) -> "Opened":
        """Reads the prompts, then what the model says of itself.

        Raises:
          Refusal: too few prompts, no such model, or what it can't do.
        """
        lines = read_prompts(self.prompts, self.model)
        if self.count > len(lines):
            raise Refusal(
                f"expected at least {self.count} prompts; got {len(lines)}: ask for fewer"
            )
        # Staged whatever the model: nothing is loaded for what is refused.
        pipeline = dataclasses.replace(self.model, staged=True).open()
        if not self.model.staged:
            pipeline = dataclasses.replace(pipeline, text_cache=None)
        default, said = pipeline.defaults, self.sampling
        steps = default.steps if said.steps is None else said.steps
        checks.whole("steps", steps, 1, MOST_STEPS)
        guidance = default.guidance if said.guidance is None else said.guidance
        if said.negative_prompt and guidance <= 1:
            raise Refusal(
                f"a negative prompt is read with guidance above 1; got {guidance:g}: leave one out"
            )
        shift = float(pipeline.shift if said.shift is None else said.shift)
        grid = pipeline.grid if said.grid is None else said.grid
        return Opened(
            self, pipeline, tuple(lines[: self.count]), pipeline.size(*self.size.check()),
            solvers.make(self.solver, steps, shift=shift, grid=grid), shift, grid,
            float(guidance) if guidance > 1 else None,
        )  # fmt: skip


class Opened(NamedTuple):
    """What was asked for, defaults filled in; no weight is read.

    Attributes:
      asked: the options.
      pipeline: its parts are shapes alone where they are loaded for their stage.
      prompts: as many as were asked for.
      size: frames, height and width.
      solver: the table.
      shift: flow shift.
      grid: whose noise levels.
      guidance: scale, or None for none.
    """

    asked: Asked
    pipeline: Any
    prompts: tuple[str, ...]
    size: tuple[int, int, int]
    solver: solvers.Solver
    shift: float
    grid: solvers.Grid
    guidance: float | None

    @property
    def choices(self) -> tuple[int, ...]:
        """Levels that the method can do."""
        whole = isinstance(METHODS[self.asked.method], StepLevel)
        return WHOLE_STEPS if whole else ALL_LEVELS

    def load(self) -> "Subject":
        """Reads the prompts' text and lets the encoder go, then loads the transformer."""
        shape = self.pipeline.latents_shape(*self.size)
        keys = [jax.random.fold_in(jax.random.key(0), i) for i in range(len(self.prompts))]
        noise = jnp.stack([jax.random.normal(key, shape, jnp.float32) for key in keys])
        negative = None if self.guidance is None else self.asked.sampling.negative_prompt
        context = self.pipeline.encode_text(self.prompts, negative)
        pipeline = resident(self.pipeline, "transformer")
        return Subject(
            pipeline, self.size, self.prompts, noise, context, self.solver, self.asked.method,
            self.guidance,
        )  # fmt: skip


class Subject(NamedTuple):
    """What is searched for: the model, its prompts and their noise, the solver and the method."""

    pipeline: Any
    size: tuple[int, int, int]
    prompts: tuple[str, ...]
    noise: jax.Array
    context: jax.Array
    solver: solvers.Solver
    method: str
    guidance: float | None

    def scorer(self, **options) -> Scorer:
        """Scores schedules on the subject's prompts."""
        return Scorer(
            self.pipeline.transformer, self.noise, self.context, solver=self.solver,
            method=METHODS[self.method], guidance=self.guidance, **options,
        )  # fmt: skip

    def with_decoder(self) -> "Subject":
        """The subject with the VAE in memory, for more than one decoding."""
        return self._replace(pipeline=resident(self.pipeline, "vae"))

    def decode(self, latents) -> jax.Array:
        """Pixels in [0, 1] of latents, one video after another, in pieces where it is large."""
        return self.pipeline.decode(latents)

    def part(self, rows: slice) -> "Subject":
        """The subject with some of its prompts."""
        number = len(self.prompts)
        branches = jnp.split(self.context, len(self.context) // number)
        context = jnp.concatenate([branch[rows] for branch in branches])
        return self._replace(prompts=self.prompts[rows], noise=self.noise[rows], context=context)


def resident(pipeline: Any, name: str) -> Any:
    """The pipeline with one of its parts in memory, whatever comes and goes for its stage."""
    loaders = dict(pipeline.loaders)
    loader = loaders.pop(name, None)
    if loader is None:
        return pipeline
    return dataclasses.replace(pipeline, loaders=loaders, **{name: loader.load()})


def read_prompts(path: pathlib.Path | None, model: ModelChoice) -> list[str]:
    """A prompt a line, or the captions that the model's folder carries; reads no weight.

    Raises:
      Refusal: no such file, nothing in it, what is no text, or a model that carries none.
    """
    if path is not None:
        lines = files.read_text(path, what="text file of prompts").splitlines()
        lines = [line.strip() for line in lines if line.strip()]
        if not lines:
            raise Refusal(f"expected a prompt a line in {path}; it is empty")
        return _checked(lines, f"{path}: prompts", "mend the file")
    asking = "the model carries no prompts: give --prompts, a file of one a line"
    if model.random is not None:
        raise Refusal(asking)
    # From the hub JSON alone is fetched, since it may say that there is nothing to search on.
    path = checkpoints.find_model(model.model, revision=model.revision).path / "captions.json"
    if not path.exists():
        raise Refusal(asking)
    captions = files.read_json(path, what="list of captions (JSON)")
    return _checked(captions, f"{path}: captions", "mend the file, or give --prompts")


def _checked(lines: Any, name: str, advice: str) -> list[str]:
    problem = checks.ListOf(_CAPTION, 1, MOST_PROMPTS).problem(lines)
    blank = None if problem else next((i for i, each in enumerate(lines) if not each.strip()), None)
    if blank is not None:
        problem = f"[{blank}] must say something; got {checks.shown(lines[blank])}"
    if problem is not None:
        raise Refusal(f"{name} {problem}; {advice}")
    return list(lines)
