"""`astraea search` and `astraea sensitivity`: a schedule for a model, a budget and a machine."""

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.console

import astraea_jax
from astraea_jax import files, metrics, report, solvers
from astraea_jax.bench.latency import latency_table
from astraea_jax.methods import METHODS, StepLevel
from astraea_jax.model import fingerprint
from astraea_jax.population import Scorer
from astraea_jax.schedule import LEVELS, Schedule, check_budget
from astraea_jax.search import plots, processes, sensitivity, study
from astraea_jax.search.evolution import SearchConfig
from astraea_jax.search.recipe import Recipe
from astraea_jax.search.scoring import Evaluator
from astraea_jax.search.space import ALL_LEVELS, WHOLE_STEPS, Space, check_band
from astraea_ports import wan

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
            raise ValueError(f"expected one of --budget, --speedup, --seconds; got {said}")
        if self.budget is not None:
            check_budget(self.budget)
        for name in ("speedup", "seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a number above 0; got {value}")


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
    def load(cls, model, prompts, skip: int, count: int, solver, steps, size, method):
        """Loads the model and `count` prompts of the file, after the first `skip`."""
        pipeline = wan.Pipeline.from_pretrained(model) if isinstance(model, str) else model
        lines = read_prompts(prompts, pipeline.folder)
        if skip + count > len(lines):
            raise ValueError(
                f"expected at least {skip + count} prompts; got {len(lines)}: ask for fewer"
            )
        lines = lines[skip : skip + count]
        size = pipeline.size(*size)
        shape = pipeline.latents_shape(*size)
        keys = [jax.random.fold_in(jax.random.key(0), skip + index) for index in range(count)]
        noise = jnp.stack([jax.random.normal(key, shape) for key in keys])
        guided = pipeline.defaults.guidance > 1
        context = pipeline.encode_text(lines, "" if guided else None)
        steps = pipeline.defaults.steps if steps is None else steps
        table = solvers.make(solver, steps, shift=pipeline.shift)
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
      ValueError: no such file, nothing in it, or a model that carries none.
    """
    if path is None:
        path = (folder or pathlib.Path()) / "captions.json"
        if not path.is_file():
            raise ValueError("the model carries no prompts: give --prompts, a file of one a line")
        return list(json.loads(path.read_text()))
    try:
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"expected a text file of prompts at {path}; {error}") from error
    if not lines:
        raise ValueError(f"expected a prompt a line in {path}; it is empty")
    return lines


def search(
    *,
    budget: float | None = None,
    speedup: float | None = None,
    seconds: float | None = None,
    output: pathlib.Path = pathlib.Path("schedule.json"),
    folder: pathlib.Path = pathlib.Path("search"),
    model: str = "tiny",
    method: SearchMethod = "step-level-corrected",
    solver: SolverName = "unipc",
    steps: int | None = None,
    prompts: pathlib.Path | None = None,
    count: int = 4,
    heldout: int = 4,
    population: int = 50,
    parents: int = 10,
    generations: int = 30,
    replacement: Literal["plus", "generational"] = "plus",
    swaps: int = 200,
    sensitivities: bool = False,
    band: tuple[float, float] | None = None,
    dense_start: int = 1,
    fitness: Literal["latents", "pixels"] = "latents",
    reduce: Literal["mean", "log"] = "log",
    patience: float | None = None,
    lanes: int = 4,
    seed: int = 0,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    distributed: bool = False,
) -> None:
    """Searches a schedule that keeps the video nearest to the dense one at a given cost.

    Args:
      budget: Mean share of the tokens to compute,
      speedup: or how many times faster than dense to denoise,
      seconds: or seconds of denoising, both by step times measured on this machine.
      output: The schedule file.
      folder: For the journal, the state and the picture; a search that was stopped goes on there.
      model: "tiny", a folder in the Diffusers layout, or a hub id.
      method: What computes the steps; the step-level ones compute whole steps or skip them.
      solver: Solver of the flow.
      steps: Denoising steps; the model's default when left out.
      prompts: A text file, one a line; the captions in the model's folder when left out.
      count: Prompts to search on, the first of the file,
      heldout: and prompts after them that the result is measured on, at least 1.
      population: Children of a generation.
      parents: Survivors that they are made from.
      generations: How many.
      replacement: "plus": parents compete with children. "generational": they do not.
      swaps: Evaluations of a local refinement at the end.
      sensitivities: Put the search-free schedule into the first population; costs T evaluations.
      band: Least and largest cost as shares of the target; exact for a budget, .9 1 for time.
      dense_start: Leading dense steps that every schedule has.
      fitness: Compare latents, or decoded pixels.
      reduce: Mean error of the prompts as the paper, or mean of its logarithm (mean PSNR).
      patience: Give a candidate up when its first prompt is this many times worse than the best.
      lanes: Schedules denoised at a time on each device.
      seed: Of the search.
      frames: Frames of the videos, 4k + 1; the model's default when left out.
      height: Pixels.
      width: Pixels.
      distributed: Share the work with the other processes of jax.distributed.
    """
    target = Target(budget, speedup, seconds)
    config = SearchConfig(population, parents, generations, replacement=replacement)
    if band is not None:
        check_band(band)
    if heldout < 1 or count < 1 or swaps < 0:
        raise ValueError(
            f"expected count and heldout of at least 1, swaps of at least 0; "
            f"got {count}, {heldout}, {swaps}"
        )
    if patience is not None and count < 2:
        raise ValueError("patience compares the first prompt: it needs a count of at least 2")
    files.check_output(output, (".json",))
    plots.pyplot()
    study.checkpointer()
    if distributed:
        jax.distributed.initialize()
    console = rich.console.Console(highlight=False)
    size = (frames, height, width)
    subject = Subject.load(model, prompts, 0, count, solver, steps, size, method)
    make = functools.partial(
        _parts, subject, dense_start=dense_start, pixels=fitness == "pixels",
        split=patience is not None, lanes=lanes,
    )  # fmt: skip
    if distributed and jax.process_index():
        console.print(f"helped with {processes.help_score(_joined(make()))} batches")
        return
    space, table = make_space(target, subject, folder, dense_start, band)
    header = _header(subject, fitness, dense_start)
    with study.open_journal(folder, header) as journal:
        parts = make()
        with processes.SharedScore(_joined(parts)) as shared:
            evaluator = Evaluator(
                [shared] if distributed else parts,
                reduce=reduce, patience=patience, keep=parents, batch=4 * lanes,
                record=journal.append,
                known={each.levels: each for each in journal.evaluations},
            )  # fmt: skip
            given = [_search_free(space, evaluator)] if sensitivities else []
            state = f"{study.STATES}-{space.low}-{space.high}-{seed}-{config.replacement}"
            result = study.evolve(
                space, config, evaluator, jax.random.key(seed), given=tuple(given),
                states=folder / state,
                progress=lambda generation: console.print(study.describe(generation)),
            )  # fmt: skip
            best, spent = result.best, 0
            if swaps:
                best, spent = sensitivity.refine(
                    space, evaluator, best, swaps, seed=seed, batch=4 * lanes
                )
        _report(console, subject, space, table, evaluator, best, result, spent)
        cost = _cost(best, table)
        points = plots.points_of(
            list(evaluator.known.values()),
            lambda levels: _cost_of(levels, table),
            evaluator.fitness,
        )
        chosen = evaluator.fitness(evaluator.known[best.levels])
        label = "seconds of denoising" if table else "budget: mean share of the tokens"
        plots.pareto(
            folder / "pareto.png", points, {"found": (_cost_of(best.levels, table), chosen)},
            cost=label,
        )  # fmt: skip
        quality = measure(subject, best, prompts, count, heldout, solver)
        Recipe(
            best, method, solver, float(subject.pipeline.shift), header["model"],
            quality, cost, astraea_jax.__version__,
        ).save(output)  # fmt: skip
    console.print(
        f"on {heldout} held-out prompts: {quality['psnr']:.1f} dB to the dense video, "
        f"SSIM {quality['ssim']:.3f}"
    )
    console.print(f"written: {output}, {folder / 'pareto.png'}")


def _parts(subject: Subject, *, dense_start, pixels: bool, split: bool, lanes: int) -> list:
    """Scores: one of all prompts, or the first prompt apart so that hopeless schedules stop."""
    rows = [slice(0, 1), slice(1, None)] if split else [slice(None)]
    return [
        subject.part(each).scorer(
            dense_start=dense_start, lanes=lanes, devices=jax.local_devices(),
            decode=subject.decode if pixels else None,
        )
        for each in rows
    ]  # fmt: skip


def _joined(parts: Sequence) -> Any:
    return lambda levels: np.concatenate([part(levels) for part in parts], axis=1)


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
        raise ValueError(f"can't make the folder {folder} ({error.strerror})") from error
    path = folder / "latency.json"
    if path.is_file():
        kept = json.loads(path.read_text())
        if kept.get("of") == key:
            return {int(level): value for level, value in kept["seconds"].items()}
    table = latency_table(subject.pipeline, subject.size, METHODS[subject.method], subject.choices)
    report.write_json(path, {"of": key, "seconds": table, **report.environment()})
    return table


def _header(subject: Subject, fitness: str, dense_start: int) -> dict:
    """What an evaluation depends on."""
    return {
        "model": fingerprint(subject.pipeline.transformer),
        "method": subject.method,
        "solver": np.asarray(subject.solver.predict).sum(axis=1).tolist(),
        "sigmas": np.asarray(subject.solver.sigma).tolist(),
        "size": list(subject.size),
        "prompts": list(subject.prompts),
        "guidance": subject.guidance,
        "fitness": fitness,
        "dense_start": dense_start,
    }


def _search_free(space: Space, evaluator: Evaluator) -> Schedule:
    """Dynamic programming over the skip-one curve."""
    damage = sensitivity.level_sensitivity(
        evaluator, space.steps, (0,), dense_start=space.dense_start
    )
    return sensitivity.allocate(space, sensitivity.interpolated(damage, (0,), space.choices))


def _cost_of(levels: Sequence[int], table: dict[int, float] | None) -> float:
    if table is None:
        return Schedule(tuple(levels)).budget
    return sum(table.get(level, table[LEVELS]) for level in levels)


def _cost(best: Schedule, table: dict[int, float] | None) -> dict[str, float]:
    cost = {"budget": best.budget}
    if table is not None:
        cost["seconds"] = _cost_of(best.levels, table)
        cost["speedup"] = best.steps * table[LEVELS] / cost["seconds"]
    return cost


def _report(console, subject, space, table, evaluator, best, result, spent) -> None:
    """What was found and what it cost to find."""
    tokens = subject.pipeline.transformer.geometry(subject.noise.shape).num_tokens
    console.print(f"levels: {' '.join(map(str, best.levels))}")
    console.print(f"realised budget: {best.realised_budget(tokens):.4f} of the tokens")
    if table is not None:
        cost = _cost(best, table)
        console.print(
            f"by measured step times: {cost['seconds']:.3f} s of denoising, "
            f"{cost['speedup']:.2f} times faster than dense"
        )
    console.print(
        f"{len(evaluator.known)} schedules known, {evaluator.evaluations} computed now, "
        f"{spent} of them swaps, {evaluator.rejected} discarded as not finite, "
        f"{result.seconds:.0f} s of evolution"
    )


def measure(subject: Subject, best: Schedule, prompts, skip: int, count: int, solver: str) -> dict:
    """Quality on prompts that the search has not seen."""
    other = Subject.load(
        subject.pipeline, prompts, skip, count, solver, subject.solver.steps, subject.size,
        subject.method,
    )  # fmt: skip
    scorer = other.scorer(lanes=1, batch=1, precision="highest")
    found = scorer.latents(best.array()[None])[0]
    pairs = [
        [metrics.to_uint8(np.asarray(other.decode(latents[i : i + 1])[0])) for i in range(count)]
        for latents in (scorer.dense, found)
    ]
    psnr = [metrics.psnr(*pair) for pair in zip(*pairs, strict=True)]
    ssim = [metrics.ssim(*pair) for pair in zip(*pairs, strict=True)]
    # Identical videos have an infinite PSNR, which JSON has no number for.
    return {
        "psnr": float(np.mean(np.minimum(psnr, 100.0))),
        "psnr_worst": float(np.min(np.minimum(psnr, 100.0))),
        "ssim": float(np.mean(ssim)),
        "mse": metrics.mse(scorer.dense, found),
        "prompts": count,
    }


def sensitivity_command(
    *,
    output: pathlib.Path = pathlib.Path("sensitivity.png"),
    model: str = "tiny",
    method: SearchMethod = "step-level",
    solver: SolverName = "unipc",
    steps: int | None = None,
    prompts: pathlib.Path | None = None,
    count: int = 4,
    lanes: int = 4,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> None:
    """Draws how far the video moves when one step alone is skipped (the paper's Figure 5).

    Args:
      output: A .png, .svg or .pdf file; the numbers go beside it as .json.
      model: "tiny", a folder in the Diffusers layout, or a hub id.
      method: What is reused at the skipped step.
      solver: Solver of the flow.
      steps: Denoising steps; the model's default when left out.
      prompts: A text file, one a line; the captions in the model's folder when left out.
      count: How many of them.
      lanes: Schedules denoised at a time.
      frames: Frames of the videos, 4k + 1; the model's default when left out.
      height: Pixels.
      width: Pixels.
    """
    files.check_output(output, plots.SUFFIXES)
    plots.pyplot()
    if count < 1:
        raise ValueError(f"count must be at least 1; got {count}")
    began = time.perf_counter()
    size = (frames, height, width)
    subject = Subject.load(model, prompts, 0, count, solver, steps, size, method)
    number = subject.solver.steps
    rows = np.full((number - 1, number), LEVELS, np.int8)
    rows[np.arange(number - 1), np.arange(1, number)] = 0
    errors = np.concatenate([np.zeros((1, count)), subject.scorer(lanes=lanes)(rows)])
    lines = {
        prompt: [float(value) for value in errors[:, index]]
        for index, prompt in enumerate(subject.prompts)
    }
    report.write_json(output.with_suffix(".json"), {"mse": lines, "solver": solver})
    plots.sensitivity(output, lines)
    shown = [{"step": step + 1, "mse": float(errors[step].mean())} for step in range(1, number)]
    rich.console.Console().print(
        report.table(shown, {"step": "skipped step", "mse": "mean squared error"})
    )
    print(f"{number - 1} schedules in {time.perf_counter() - began:.1f} s")
    print(f"written: {output}, {output.with_suffix('.json')}")
