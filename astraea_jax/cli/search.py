"""`astraea search`: a schedule for a model, a budget and a machine."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np

import astraea_jax
from astraea_jax import checks, files, solvers
from astraea_jax.bench.models import TINY, Chosen
from astraea_jax.checks import Refusal
from astraea_jax.cli import identity
from astraea_jax.cli.found import Found, costs, draw, measure, report
from astraea_jax.cli.subject import (
    MOST_LANES,
    MOST_PROMPTS,
    Asked,
    SearchMethod,
    SolverName,
    Subject,
)
from astraea_jax.cli.target import LATENCY, Latencies, Target, budget_space, timed_space
from astraea_jax.schedule import Schedule
from astraea_jax.search import plots, processes, sensitivity, study
from astraea_jax.search.evolution import SearchConfig
from astraea_jax.search.recipe import Recipe
from astraea_jax.search.scoring import Evaluator, check_patience, known_to
from astraea_jax.search.space import MOST_STEPS, Space, check_band

PICTURE = "pareto.png"


def command(
    *,
    budget: float | None = None,
    speedup: float | None = None,
    seconds: float | None = None,
    output: pathlib.Path = pathlib.Path("out.json"),
    folder: pathlib.Path = pathlib.Path("out_search"),
    model: Chosen = TINY,
    method: SearchMethod = "step-level-corrected",
    solver: SolverName = "unipc",
    grid: solvers.Grid | None = None,
    shift: float | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str = "",
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
      model: Which model.
      method: What computes the steps; the step-level ones compute whole steps or skip them.
      solver: Solver of the flow.
      grid: Whose noise levels; left out, those of the checkpoint's layout.
      shift: Flow shift; the model's own when left out.
      steps: Denoising steps; the model's default when left out.
      guidance: Scale of classifier-free guidance; the model's default when left out.
      negative_prompt: What the videos should not show.
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
    _check(band, count, heldout, swaps, patience, dense_start, lanes, seed, distributed)
    checks.one_of("fitness", fitness, ("latents", "pixels"))
    checks.one_of("reduce", reduce, ("mean", "log"))
    asked = Asked(
        model, prompts, count + heldout, method, solver, steps, (frames, height, width),
        grid, shift, guidance, negative_prompt,
    )  # fmt: skip
    _check_files(output, folder, prompts)
    latencies = Latencies(folder, used=target.budget is None)
    if distributed:
        _join_processes()
    opened = asked.open()
    changes = identity.lora_names(model.lora)
    space = budget_space(target, opened, dense_start, band)
    # Made now, so that what a file can't hold is refused now.
    recipe = Recipe(
        Schedule.dense(opened.solver.steps), method, solver, opened.shift, opened.grid, "unknown",
        {}, {}, astraea_jax.__version__, opened.guidance or 1.0, negative_prompt, changes,
        precision=model.precision,
    )  # fmt: skip
    everything = opened.load()
    if fitness == "pixels":
        everything = everything.with_decoder()
    subject = everything.part(slice(count))
    make_parts = functools.partial(
        _parts, subject, dense_start=dense_start, pixels=fitness == "pixels",
        split=patience is not None, lanes=lanes,
    )  # fmt: skip
    if distributed and jax.process_index():
        print(f"helped with {processes.help_score(_joined(make_parts()))} batches")
        return
    table = None
    if space is None:
        table = latencies.table(subject, opened.choices, precision=model.precision, lora=changes)
        space = timed_space(target, opened, table, dense_start, band)
    header = identity.header(
        subject, opened, precision=model.precision, lora=changes, fitness=fitness,
        dense_start=dense_start,
    )  # fmt: skip
    name = identity.name(
        header, space, config, reduce=reduce, patience=patience, batch=4 * lanes, seed=seed,
        sensitivities=sensitivities,
    )  # fmt: skip
    steps = opened.solver.steps
    with study.open_journal(folder, header, steps=steps, prompts=count) as journal:
        if table is not None:
            latencies.keep()
        parts = make_parts()
        with processes.SharedScore(_joined(parts)) as shared:
            evaluator = Evaluator(
                [shared] if distributed else parts, reduce=reduce, patience=patience,
                keep=parents, batch=4 * lanes, record=journal.append, search=name,
                known=known_to(name, journal.evaluations),
            )  # fmt: skip
            # Orbax waits for all processes; with helpers the journal alone is the resume.
            states = None if distributed else folder / f"{study.STATES}-{name}"
            found = _search(space, config, evaluator, seed, sensitivities, swaps, states)
    recipe = dataclasses.replace(
        recipe, schedule=found.best, model=header["model"], cost=costs(found.best, table),
        dtype=header["dtype"],
    )  # fmt: skip
    recipe.save(output)
    report(subject, table, evaluator, found)
    draw(folder / PICTURE, evaluator, found.best, table)
    print(f"written: {output}, {folder / PICTURE}")
    # What scored is let go before whole videos are decoded.
    evaluator.parts = ()
    del parts, shared
    quality = measure(everything.part(slice(count, None)), found.best)
    dataclasses.replace(recipe, quality=quality).save(output)
    print(
        f"on {heldout} held-out prompts: {quality['psnr']:.1f} dB to the dense video, "
        f"SSIM {quality['ssim']:.3f}; written into {output}"
    )


def _check(
    band, count: int, heldout: int, swaps: int, patience: float | None, dense_start: int,
    lanes: int, seed: int, distributed: bool,
) -> None:  # fmt: skip
    """Refuses numbers out of range before anything is read."""
    if band is not None:
        check_band(band)
    for name, value, low, high in (
        ("count", count, 1, MOST_PROMPTS),
        ("heldout", heldout, 1, MOST_PROMPTS),
        ("swaps", swaps, 0, 1_000_000),
        ("dense_start", dense_start, 1, MOST_STEPS),
        ("lanes", lanes, 1, MOST_LANES),
        ("seed", seed, 0, 2**32 - 1),
    ):
        checks.whole(name, value, low, high)
    if patience is None:
        return
    check_patience(patience)
    if count < 2:
        raise Refusal("patience compares the first prompt: it needs a count of at least 2")
    if distributed:
        raise Refusal("processes score all prompts at once: leave --patience or --distributed out")


def _check_files(output, folder: pathlib.Path, prompts: pathlib.Path | None) -> None:
    """Refuses files that can't be written, or that would be written over; leaves none behind."""
    files.check_output(output, (".json",))
    kept = [folder / name for name in (study.JOURNAL, PICTURE, LATENCY)]
    files.check_apart(output, prompts, *kept)
    for path in kept:
        files.check_apart(path, prompts)
    files.check_folder(folder)
    if os.path.isdir(folder):
        files.check_output(folder / PICTURE, plots.SUFFIXES)


def _join_processes() -> None:
    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise Refusal(
            f"can't join the processes of jax.distributed ({files.reason(error)}): start the "
            "command where they are set up, or leave --distributed out"
        ) from error


def _search(
    space: Space, config: SearchConfig, evaluator: Evaluator,
    seed: int, sensitivities: bool, swaps: int, states: pathlib.Path | None,
) -> Found:  # fmt: skip
    """Evolution, its states kept in the folder, then local swaps."""
    given = (_search_free(space, evaluator),) if sensitivities else ()
    result = study.evolve(
        space, config, evaluator, jax.random.key(seed), given=given, states=states,
        progress=lambda generation: print(study.describe(generation), flush=True),
    )  # fmt: skip
    if not swaps:
        evaluator(result.best.array()[None])  # known to the state, and to a journal that is whole
        return Found(result.best, result, 0)
    batch = evaluator.batch
    best, spent = sensitivity.refine(space, evaluator, result.best, swaps, seed=seed, batch=batch)
    return Found(best, result, spent)


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


def _search_free(space: Space, evaluator: Evaluator) -> Schedule:
    """Dynamic programming over the skip-one curve."""
    damage = sensitivity.level_sensitivity(
        evaluator, space.steps, (0,), dense_start=space.dense_start
    )
    return sensitivity.allocate(space, sensitivity.interpolated(damage, (0,), space.choices))
