"""Every way to find a schedule, at equal budgets, on held-out prompts."""

import dataclasses
import os
import pathlib
import time
from collections.abc import Sequence

import jax

import astraea_jax
import start
from astraea_jax import checks, files, report
from astraea_jax.bench import options as options_of
from astraea_jax.checks import Refusal
from astraea_jax.cli.options import check_size
from astraea_jax.methods import METHODS, StepLevel
from astraea_jax.model import fingerprint
from astraea_jax.search import journal as journals
from astraea_jax.search.space import WHOLE_STEPS, Space
from astraea_ports import wan
from search_parts import BUDGETS, ONLY_ASKED_FOR, PARTS, run
from search_ship import write_recipes
from search_study import (
    RESULTS,
    SHIPPED,
    Options,
    OutOfTime,
    Study,
    read_rows,
)


def command(
    *,
    output: pathlib.Path = pathlib.Path("out_study"),
    minutes: float = 480.0,
    steps: int = 30,
    budgets: tuple[float, ...] = BUDGETS,
    solver: tuple[str, ...] = ("unipc", "euler"),
    search_prompts: int = 4,
    pool: int = 48,
    seeds: int = 4,
    look: int = 8,
    heldout_prompts: int = 16,
    population: int = 32,
    generations: int = 6,
    swaps: int = 64,
    patience: float = 1.3,
    finalists: int = 16,
    rows: int = 256,
    parts: tuple[str, ...] = tuple(name for name in PARTS if name not in ONLY_ASKED_FOR),
    known: pathlib.Path | None = None,
    starts: pathlib.Path | None = None,
    reuses: tuple[str, ...] = ("step-level-corrected", "step-level"),
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    model: str = "tiny",
    revision: str | None = None,
    ship: pathlib.Path | None = None,
) -> None:
    """Searches schedules in every way and judges them on held-out prompts; hours on a CPU.

    Args:
      output: Folder for the journal and results.json; a run that was stopped goes on from it.
      minutes: After so many no further work is started; 0 only prints what was found, in the
        folder or (where it holds nothing) in search.json.
      steps: Of the dense videos.
      budgets: Shares of the tokens.
      solver: Solvers to search for.
      search_prompts: Prompts that are searched on: those of
      pool: so many that stand best for it;
      seeds: each with the noise of so many seeds,
      look: so many videos at a time: a schedule that fails some is not tried on the rest.
      heldout_prompts: Prompts judged on, at least 2; none of them is searched on.
      population: Children of a generation.
      generations: Of each search.
      swaps: Evaluations of the local refinement.
      patience: A schedule passes the first look if its error is at most so many times that of
        the best so far there.
      finalists: Of each search, chosen from by prompts that it has not seen.
      parts: Of the study, in order. Only where asked for: "again" searches whole steps from all
        that was found before, "transfer" judges on this model what --starts found on another.
      known: A results.json whose rows are not measured again, where the folder holds none.
      starts: A results.json, of any model, whose schedules the searches begin at too.
      reuses: Step-level methods that are searched for; the better of them is judged.
      rows: Videos denoised at a time, guidance branches counted.
      frames: Frames of the videos, 4k + 1; the model's default when left out.
      height: Pixels.
      width: Pixels.
      model: A model that knows such prompts.
      revision: Of a hub id: a branch, a tag or a commit.
      ship: Write the best schedule of each solver and budget into this folder, as a model carries
        them for `astraea generate --budget`.
    """
    checks.number("minutes", minutes, 0, 1e6)
    check_size(frames, height, width)
    options_of.check_budgets(budgets)
    deadline = time.perf_counter() + 60 * minutes
    if set(parts) - set(PARTS):
        raise Refusal(f"parts must be among {', '.join(PARTS)}; got {', '.join(parts)}")
    if "transfer" in parts and starts is None:
        raise Refusal("the part transfer judges what another study found: say which by --starts")
    for budget in budgets:
        Space.for_budget(steps, budget, choices=WHOLE_STEPS)
    options = Options(
        steps, budgets, solver, search_prompts, pool, seeds, look, heldout_prompts, population,
        generations, swaps, patience, finalists, rows, (frames or 0, height or 0, width or 0),
    )  # fmt: skip
    for path in (known, starts):
        if path is not None and not os.path.isfile(path):
            raise Refusal(f"expected a results.json of an earlier study at {path}; got no file")
    for reuse in reuses:
        checks.one_of("reuses", reuse, _REUSES)
    for folder in (output, *([ship] if ship is not None else [])):
        files.check_folder(folder)
    if os.path.isdir(output):
        files.check_output(output / RESULTS, (".json",))
    rows_before = read_rows(known) if known else ()
    elsewhere = read_rows(starts) if starts else ()
    pipeline = wan.Pipeline.from_pretrained(model, revision=revision, staged=False)
    if minutes > 0:
        options = dataclasses.replace(options, size=pipeline.size(frames, height, width))
        header = {"study": dataclasses.asdict(options), "jax": jax.__version__}
        header["model"] = fingerprint(pipeline.transformer)
        header["backend"] = jax.default_backend()
        header["sampling"] = [pipeline.shift, pipeline.grid, pipeline.defaults.guidance]
        header["text"], header["version"] = pipeline.text_name, astraea_jax.__version__
        with journals.open_journal(output, header) as journal:
            it = Study(pipeline, options, output, deadline, rows_before, elsewhere)
            try:
                run(it, journal, parts, reuses)
            except OutOfTime:
                it.say("out of time; run again to go on")
            it.save()
    found = read_rows(output / RESULTS) or read_rows(SHIPPED)
    print(report.markdown(table(found), COLUMNS))
    if ship is not None:
        for path in write_recipes(found, pipeline, ship):
            print(f"written: {path}")


def table(rows: Sequence[dict]) -> list[dict]:
    """The rows to read: of the hand-made patterns only the best on the held-out prompts."""
    judged = [row for row in rows if "psnr" in row]
    groups: dict[tuple, list[dict]] = {}
    for row in judged:
        kind = "best hand-made" if row["what"].startswith("hand-made") else row["what"]
        by_hand = kind == "best hand-made"
        run = None if by_hand else row.get("run")
        groups.setdefault((row["solver"], row["budget"], kind, row["method"], run), []).append(row)
    chosen = []
    for (_, _, kind, _, _), members in groups.items():
        best = max(members, key=lambda row: row["psnr"])
        what = f"best of {len(members)}: {best['what']}" if kind == "best hand-made" else kind
        chosen.append({**best, "what": what})
    return sorted(chosen, key=lambda row: (row["solver"], row["budget"], -row["psnr"]))


_REUSES = [name for name, each in METHODS.items() if isinstance(each, StepLevel)]

COLUMNS = {
    "run": "run",
    "solver": "solver",
    "budget": "budget",
    "what": "schedule",
    "method": "reuse",
    "psnr": "PSNR dB",
    "psnr_half_width": "+-",
    "psnr_worst": "worst",
    "ssim": "SSIM",
    "mse": "MSE, latents",
    "evaluations": "evaluations",
    "seconds": "s",
}


if __name__ == "__main__":
    start.run(command)
