"""What a search is for: a model with prompts, a solver and a method, and a target cost."""

import dataclasses
import json
import pathlib
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from astraea_jax import report, solvers
from astraea_jax.bench.latency import latency_table
from astraea_jax.bench.models import ModelChoice
from astraea_jax.checks import Refusal
from astraea_jax.methods import METHODS, StepLevel
from astraea_jax.model import fingerprint
from astraea_jax.population import Scorer
from astraea_jax.schedule import LEVELS, check_budget
from astraea_jax.search.space import ALL_LEVELS, WHOLE_STEPS, Space

SolverName = Literal["unipc", "euler"]
SearchMethod = Literal[
    "step-level-corrected", "step-level", "step-level-residual", "astraea-corrected", "astraea"
]


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
        for name in ("speedup", "seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise Refusal(f"{name} must be a number above 0; got {value}")


class Subject(NamedTuple):
    """What is searched for: the model, its prompts and their noise, the solver and the method."""

    pipeline: Any
    size: tuple[int, int, int]
    prompts: tuple[str, ...]
    noise: jax.Array
    context: jax.Array
    solver: solvers.Solver
    method: str

    @classmethod
    def load(cls, model, prompts, skip: int, count: int, solver, steps, size, method, spare=0):
        """Loads the model and `count` prompts of the file, after the first `skip`.

        At least `spare` prompts must follow them, for what comes after.
        """
        pipeline = model.open() if isinstance(model, ModelChoice) else model
        lines = read_prompts(prompts, pipeline.folder)
        if skip + count + spare > len(lines):
            raise Refusal(
                f"expected at least {skip + count + spare} prompts; got {len(lines)}: ask for fewer"
            )
        lines = lines[skip : skip + count]
        size = pipeline.size(*size)
        shape = pipeline.latents_shape(*size)
        keys = [jax.random.fold_in(jax.random.key(0), skip + index) for index in range(count)]
        noise = jnp.stack([jax.random.normal(key, shape, jnp.float32) for key in keys])
        guided = pipeline.defaults.guidance > 1
        context = pipeline.encode_text(lines, "" if guided else None)
        steps = pipeline.defaults.steps if steps is None else steps
        table = solvers.make(solver, steps, shift=pipeline.shift, grid=pipeline.grid)
        return cls(pipeline, size, tuple(lines), noise, context, table, method)

    @property
    def guidance(self) -> float | None:
        """Scale, or None for none."""
        scale = self.pipeline.defaults.guidance
        return scale if scale > 1 else None

    @property
    def choices(self) -> tuple[int, ...]:
        """Levels that the method can do."""
        return WHOLE_STEPS if isinstance(METHODS[self.method], StepLevel) else ALL_LEVELS

    def scorer(self, **options) -> Scorer:
        """Scores schedules on the subject's prompts."""
        return Scorer(
            self.pipeline.transformer, self.noise, self.context, solver=self.solver,
            method=METHODS[self.method], guidance=self.guidance, **options,
        )  # fmt: skip

    def decode(self, latents) -> jax.Array:
        """Pixels in [0, 1] of latents, one video after another."""
        return jnp.concatenate(
            [_decode(self.pipeline.vae, latents[i : i + 1]) for i in range(len(latents))]
        )

    def part(self, rows: slice) -> "Subject":
        """The subject with some of its prompts."""
        number = len(self.prompts)
        branches = jnp.split(self.context, len(self.context) // number)
        context = jnp.concatenate([branch[rows] for branch in branches])
        return self._replace(prompts=self.prompts[rows], noise=self.noise[rows], context=context)


@jax.jit
def _decode(vae, latents):
    return jnp.clip((vae.decode(latents) + 1) / 2, 0, 1)


def read_prompts(path: pathlib.Path | None, folder: pathlib.Path | None) -> list[str]:
    """A prompt a line, or the captions that the model's folder carries.

    Raises:
      Refusal: no such file, nothing in it, or a model that carries none.
    """
    if path is None:
        path = (folder or pathlib.Path()) / "captions.json"
        if not path.is_file():
            raise Refusal("the model carries no prompts: give --prompts, a file of one a line")
        return list(json.loads(path.read_text()))
    try:
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"expected a text file of prompts at {path}; {error}") from error
    if not lines:
        raise Refusal(f"expected a prompt a line in {path}; it is empty")
    return lines


def make_space(target: Target, subject: Subject, folder, dense_start: int, band):
    """The space of a target, and seconds by level where it is counted in time (else None)."""
    steps, choices = subject.solver.steps, subject.choices
    if target.budget is not None:
        band = (1.0, 1.0) if band is None else band
        space = Space.for_budget(
            steps, target.budget, choices=choices, band=band, dense_start=dense_start
        )
        return space, None
    table = _latencies(subject, folder)
    dense = steps * table[LEVELS]
    limit = target.seconds if target.seconds is not None else dense / (target.speedup or 1)
    low, high = (0.9, 1.0) if band is None else band
    costs = [table[level] for level in choices]
    space = Space.for_costs(
        steps, costs, high * limit, choices=choices, band=low / high, dense_start=dense_start
    )
    return space, table


def _latencies(subject: Subject, folder: pathlib.Path) -> dict[int, float]:
    """The table of this model, shape, method and device: measured once, kept in the folder."""
    key = {
        "model": fingerprint(subject.pipeline.transformer),
        "size": list(subject.size),
        "method": subject.method,
        "device": jax.devices()[0].device_kind,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refusal(f"can't make the folder {folder} ({error.strerror})") from error
    path = folder / "latency.json"
    if path.is_file():
        kept = json.loads(path.read_text())
        if kept.get("of") == key:
            return {int(level): value for level, value in kept["seconds"].items()}
    table = latency_table(subject.pipeline, subject.size, METHODS[subject.method], subject.choices)
    report.write_json(path, {"of": key, "seconds": table, **report.environment()})
    return table
