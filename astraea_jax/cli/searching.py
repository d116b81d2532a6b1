"""What `astraea search` does: score schedules, keep what it learns, judge what it finds."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np

import astraea_jax
from astraea_jax import checks, files
from astraea_jax.checks import Refusal
from astraea_jax.cli import identity
from astraea_jax.cli.found import Found, costs, draw, measure, report
from astraea_jax.cli.options import MOST_LANES, MOST_PROMPTS
from astraea_jax.cli.subject import Asked, Opened, Subject
from astraea_jax.cli.target import (
    LATENCY,
    Band,
    Latencies,
    Target,
    budget_space,
    timed_space,
)
from astraea_jax.schedule import Schedule
from astraea_jax.search import journal as journals
from astraea_jax.search import plots, processes, sensitivity, study
from astraea_jax.search.evolution import SearchConfig
from astraea_jax.search.recipe import Recipe
from astraea_jax.search.scoring import Evaluator, check_patience, known_to
from astraea_jax.search.space import MOST_STEPS, Space, check_band

PICTURE = "pareto.png"


@dataclasses.dataclass(frozen=True)
class Search:
    """What the command was asked for.

    Attributes:
      target: what the schedule shall cost.
      config: of the evolution.
      asked: the model, its prompts (those to search on, then those to judge by) and its sampling.
      output: the schedule file.
      folder: for the journal, the state and the picture.
      heldout: prompts that the result is measured on.
      swaps: evaluations of a local refinement at the end.
      sensitivities: whether the search-free schedule is in the first population.
      band: least and largest cost as shares of the target.
      dense_start: leading dense steps.
      fitness: "latents" or "pixels".
      reduce: "mean" or "log".
      patience: how many times worse a candidate's first prompt may be.
      lanes: schedules denoised at a time on each device.
      seed: of the search.
      distributed: whether other processes of jax.distributed help.

    Raises:
      Refusal: a number out of range, or a file that can't be written.
    """

    target: Target
    config: SearchConfig
    asked: Asked
    output: pathlib.Path
    folder: pathlib.Path
    heldout: int
    swaps: int
    sensitivities: bool
    band: Band
    dense_start: int
    fitness: Literal["latents", "pixels"]
    reduce: Literal["mean", "log"]
    patience: float | None
    lanes: int
    seed: int
    distributed: bool

    def __post_init__(self):
        if self.band is not None:
            check_band(self.band)
        for name, value, low, high in (
            ("count", self.count, 1, MOST_PROMPTS),
            ("heldout", self.heldout, 1, MOST_PROMPTS),
            ("swaps", self.swaps, 0, 1_000_000),
            ("dense_start", self.dense_start, 1, MOST_STEPS),
            ("lanes", self.lanes, 1, MOST_LANES),
            ("seed", self.seed, 0, 2**32 - 1),
        ):
            checks.whole(name, value, low, high)
        self._check_patience()
        checks.one_of("fitness", self.fitness, ("latents", "pixels"))
        checks.one_of("reduce", self.reduce, ("mean", "log"))
        _check_files(self.output, self.folder, self.asked.prompts)

    def _check_patience(self) -> None:
        if self.patience is None:
            return
        check_patience(self.patience)
        if self.count < 2:
            raise Refusal("patience compares the first prompt: it needs a count of at least 2")
        if self.distributed:
            raise Refusal(
                "processes score all prompts at once: leave --patience or --distributed out"
            )

    @property
    def count(self) -> int:
        """Prompts to search on."""
        return self.asked.count - self.heldout

    @property
    def batch(self) -> int:
        """Schedules that are scored between two looks at the journal."""
        return 4 * self.lanes


def run(search: Search) -> None:
    """Searches, writes the schedule and its picture, and judges it on the held-out prompts."""
    latencies = Latencies(search.folder, used=search.target.budget is None)
    if search.distributed:
        _join_processes()
    opened = search.asked.open()
    changes = identity.lora_names(search.asked.model.lora)
    space = budget_space(search.target, opened, search.dense_start, search.band)
    # Made now, so that what a file can't hold is refused now.
    recipe = _recipe(search, opened, changes)
    everything = opened.load()
    if search.fitness == "pixels":
        everything = everything.with_decoder()
    subject = everything.part(slice(search.count))
    if search.distributed and jax.process_index():
        print(f"helped with {processes.help_score(_joined(_parts(search, subject)))} batches")
        return
    weights = {"precision": search.asked.model.precision, "lora": changes}
    table = None
    if space is None:
        table = latencies.table(subject, opened.choices, **weights)
        space = timed_space(search.target, opened, table, search.dense_start, search.band)
    header = identity.header(
        subject, opened, **weights, fitness=search.fitness, dense_start=search.dense_start
    )
    keep = latencies.keep if table is not None else None
    found, evaluator = _find(search, subject, space, header, opened.solver.steps, keep)
    recipe = dataclasses.replace(
        recipe, schedule=found.best, model=header["model"], cost=costs(found.best, table),
        dtype=header["dtype"],
    )  # fmt: skip
    recipe.save(search.output)
    report(subject, table, evaluator, found)
    draw(search.folder / PICTURE, evaluator, found.best, table)
    print(f"written: {search.output}, {search.folder / PICTURE}")
    del evaluator  # what scored is let go before whole videos are decoded
    quality = measure(everything.part(slice(search.count, None)), found.best)
    dataclasses.replace(recipe, quality=quality).save(search.output)
    print(
        f"on {search.heldout} held-out prompts: {quality['psnr']:.1f} dB to the dense video, "
        f"SSIM {quality['ssim']:.3f}; written into {search.output}"
    )


def _recipe(search: Search, opened: Opened, changes: list[str]) -> Recipe:
    """What the schedule file will say, before a schedule is found."""
    asked = search.asked
    return Recipe(
        Schedule.dense(opened.solver.steps), asked.method, asked.solver, opened.shift, opened.grid,
        "unknown", {}, {}, astraea_jax.__version__, opened.guidance or 1.0,
        asked.sampling.negative_prompt, changes, precision=asked.model.precision,
    )  # fmt: skip


def _find(
    search: Search, subject: Subject, space: Space, header: dict[str, Any], steps: int, keep
) -> tuple[Found, Evaluator]:
    """The search itself, every evaluation journaled; `keep` is called once the journal is ours."""
    name = identity.name(
        header, space, search.config, reduce=search.reduce, patience=search.patience,
        batch=search.batch, seed=search.seed, sensitivities=search.sensitivities,
    )  # fmt: skip
    with journals.open_journal(search.folder, header, steps=steps, prompts=search.count) as journal:
        if keep is not None:
            keep()
        parts = _parts(search, subject)
        with processes.SharedScore(_joined(parts)) as shared:
            evaluator = Evaluator(
                [shared] if search.distributed else parts, reduce=search.reduce,
                patience=search.patience, keep=search.config.parents, batch=search.batch,
                record=journal.append, search=name, known=known_to(name, journal.evaluations),
            )  # fmt: skip
            # Orbax waits for all processes; with helpers the journal alone is the resume.
            states = None if search.distributed else search.folder / f"{study.STATES}-{name}"
            found = _search(search, space, evaluator, states)
    evaluator.parts = ()
    return found, evaluator


def _check_files(output, folder: pathlib.Path, prompts: pathlib.Path | None) -> None:
    """Refuses files that can't be written, or that would be written over; leaves none behind."""
    files.check_output(output, (".json",))
    kept = [folder / name for name in (journals.JOURNAL, PICTURE, LATENCY)]
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
    search: Search, space: Space, evaluator: Evaluator, states: pathlib.Path | None
) -> Found:
    """Evolution, its states kept in the folder, then local swaps."""
    given = (_search_free(space, evaluator),) if search.sensitivities else ()
    result = study.evolve(
        space, search.config, evaluator, jax.random.key(search.seed), given=given, states=states,
        progress=lambda generation: print(study.describe(generation), flush=True),
    )  # fmt: skip
    if not search.swaps:
        evaluator(result.best.array()[None])  # known to the state, and to a journal that is whole
        return Found(result.best, result, 0)
    best, spent = sensitivity.refine(
        space, evaluator, result.best, search.swaps, seed=search.seed, batch=evaluator.batch
    )
    return Found(best, result, spent)


def _parts(search: Search, subject: Subject) -> list:
    """Scores: one of all prompts, or the first prompt apart so that hopeless schedules stop."""
    split = search.patience is not None
    rows = [slice(0, 1), slice(1, None)] if split else [slice(None)]
    return [
        subject.part(each).scorer(
            dense_start=search.dense_start, lanes=search.lanes, devices=jax.local_devices(),
            decode=subject.decode if search.fitness == "pixels" else None,
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
