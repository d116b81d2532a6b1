"""`astraea search`: a schedule for a model, a budget and a machine."""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import rich.console

import astraea_jax
from astraea_jax import files, metrics
from astraea_jax.bench.models import Dtype, ModelChoice
from astraea_jax.checks import Refusal
from astraea_jax.cli.subject import SearchMethod, SolverName, Subject, Target, make_space
from astraea_jax.model import fingerprint
from astraea_jax.schedule import LEVELS, Schedule
from astraea_jax.search import plots, processes, sensitivity, study
from astraea_jax.search.evolution import SearchConfig
from astraea_jax.search.recipe import Recipe
from astraea_jax.search.scoring import Evaluator
from astraea_jax.search.space import Space, check_band


def command(
    *,
    budget: float | None = None,
    speedup: float | None = None,
    seconds: float | None = None,
    output: pathlib.Path = pathlib.Path("out.json"),
    folder: pathlib.Path = pathlib.Path("out_search"),
    model: str = "tiny",
    checkpoint: pathlib.Path | None = None,
    random: bool = False,
    dtype: Dtype | None = None,
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
      model: "tiny", "wan", "wan-14b", a folder in either layout, or a hub id.
      checkpoint: Folder or hub id of the weights of "wan" or "wan-14b",
      random: or random weights of their size.
      dtype: Of the weights; bfloat16 for "wan" and "wan-14b", else float32, when left out.
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
    _check(band, count, heldout, swaps, patience)
    files.check_output(output, (".json",))
    if distributed:
        jax.distributed.initialize()
    console = rich.console.Console(highlight=False)
    choice = ModelChoice(model, checkpoint, random, dtype)
    size = (frames, height, width)
    subject = Subject.load(choice, prompts, 0, count, solver, steps, size, method, spare=heldout)
    make_parts = functools.partial(
        _parts, subject, dense_start=dense_start, pixels=fitness == "pixels",
        split=patience is not None, lanes=lanes,
    )  # fmt: skip
    if distributed and jax.process_index():
        console.print(f"helped with {processes.help_score(_joined(make_parts()))} batches")
        return
    space, table = make_space(target, subject, folder, dense_start, band)
    header = _header(subject, fitness, dense_start)
    with study.open_journal(folder, header) as journal:
        parts = make_parts()
        with processes.SharedScore(_joined(parts)) as shared:
            evaluator = _evaluator(
                journal, [shared] if distributed else parts,
                reduce=reduce, patience=patience, keep=parents, batch=4 * lanes,
            )  # fmt: skip
            # Orbax waits for all processes; with helpers the journal alone is the resume.
            states = None if distributed else folder
            found = _search(space, config, evaluator, console, seed, sensitivities, swaps, states)
    _report(console, subject, table, evaluator, found)
    _draw(folder / "pareto.png", evaluator, found.best, table)
    quality = measure(subject, found.best, prompts, count, heldout, solver)
    Recipe(
        found.best, method, solver, float(subject.pipeline.shift), subject.pipeline.grid,
        header["model"], quality, _cost(found.best, table), astraea_jax.__version__,
    ).save(output)  # fmt: skip
    console.print(
        f"on {heldout} held-out prompts: {quality['psnr']:.1f} dB to the dense video, "
        f"SSIM {quality['ssim']:.3f}"
    )
    print(f"written: {output}, {folder / 'pareto.png'}")


def _check(band, count: int, heldout: int, swaps: int, patience: float | None) -> None:
    """Refuses numbers out of range before anything is loaded."""
    if band is not None:
        check_band(band)
    if heldout < 1 or count < 1 or swaps < 0:
        raise Refusal(
            f"expected count and heldout of at least 1, swaps of at least 0; "
            f"got {count}, {heldout}, {swaps}"
        )
    if patience is not None and count < 2:
        raise Refusal("patience compares the first prompt: it needs a count of at least 2")


class Found(NamedTuple):
    """What a search ends with.

    Attributes:
      best: the schedule.
      generation: the last one.
      swaps: evaluations of the local refinement.
    """

    best: Schedule
    generation: study.Generation
    swaps: int


def _search(
    space: Space, config: SearchConfig, evaluator: Evaluator, console,
    seed: int, sensitivities: bool, swaps: int, folder: pathlib.Path | None,
) -> Found:  # fmt: skip
    """Evolution, its states kept in the folder, then local swaps."""
    given = (_search_free(space, evaluator),) if sensitivities else ()
    drawn = dataclasses.replace(config, generations=0), space, seed, sensitivities
    name = hashlib.sha256(repr(drawn).encode()).hexdigest()[:8]
    result = study.evolve(
        space, config, evaluator, jax.random.key(seed), given=given,
        states=None if folder is None else folder / f"{study.STATES}-{name}",
        progress=lambda generation: console.print(study.describe(generation)),
    )  # fmt: skip
    if not swaps:
        return Found(result.best, result, 0)
    batch = evaluator.batch
    best, spent = sensitivity.refine(space, evaluator, result.best, swaps, seed=seed, batch=batch)
    return Found(best, result, spent)


def _evaluator(journal: study.Journal, parts, *, patience: float | None, **options) -> Evaluator:
    """Scores and writes to the journal; what the journal holds is known."""
    # What was given up is looked at again by a search that gives nothing up.
    known = [each for each in journal.evaluations if patience or not each.stopped]
    known = {each.levels: each for each in known}
    return Evaluator(parts, patience=patience, record=journal.append, known=known, **options)


def _draw(path: pathlib.Path, evaluator: Evaluator, best: Schedule, table) -> None:
    """The Pareto plot of everything that is known."""
    points = plots.points_of(
        list(evaluator.known.values()), lambda levels: _cost_of(levels, table), evaluator.fitness
    )
    found = _cost_of(best.levels, table), evaluator.fitness(evaluator.known[best.levels])
    label = "seconds of denoising" if table else "budget: mean share of the tokens"
    plots.pareto(path, points, {"found": found}, cost=label)


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


def _report(console, subject, table, evaluator, found: Found) -> None:
    """What was found and what it cost to find."""
    best = found.best
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
        f"{found.swaps} of them swaps, {evaluator.rejected} discarded as not finite, "
        f"{found.generation.seconds:.0f} s of evolution"
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
