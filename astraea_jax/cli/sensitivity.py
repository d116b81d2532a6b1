"""`astraea sensitivity`: how much each step matters."""

import pathlib
import time
from collections.abc import Sequence

import numpy as np

from astraea_jax import checks, files, report
from astraea_jax.bench.models import TINY, Chosen
from astraea_jax.checks import Refusal
from astraea_jax.cli.subject import MOST_LANES, Asked, SearchMethod, SolverName
from astraea_jax.schedule import LEVELS
from astraea_jax.search import plots


def command(
    *,
    output: pathlib.Path = pathlib.Path("out.png"),
    model: Chosen = TINY,
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
      model: Which model.
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
    checks.whole("lanes", lanes, 1, MOST_LANES)
    size = (frames, height, width)
    asked = Asked(model, prompts, count, method, solver, steps, size)
    numbers = output.with_suffix(".json")
    files.check_output(output, plots.SUFFIXES)
    files.check_output(numbers, (".json",))
    for path in (output, numbers):
        files.check_apart(path, prompts)
    began = time.perf_counter()
    opened = asked.open()
    number = opened.solver.steps
    if number < 2:
        raise Refusal("the first step is never skipped: ask for at least 2 steps")
    subject = opened.load()
    rows = np.full((number - 1, number), LEVELS, np.int8)
    rows[np.arange(number - 1), np.arange(1, number)] = 0
    errors = np.concatenate([np.zeros((1, count)), subject.scorer(lanes=lanes)(rows)])
    lines = {
        name: [float(value) for value in errors[:, index]]
        for index, name in enumerate(_names(subject.prompts))
    }
    report.write_json(numbers, {"mse": lines, "solver": solver})
    plots.sensitivity(output, lines)
    shown = [{"step": step + 1, "mse": float(errors[step].mean())} for step in range(1, number)]
    report.show(report.table(shown, {"step": "skipped step", "mse": "mean squared error"}))
    print(f"{number - 1} schedules in {time.perf_counter() - began:.1f} s")
    print(f"written: {output}, {numbers}")


def _names(prompts: Sequence[str]) -> list[str]:
    """The prompts; one that comes again is numbered, or its line would replace the first one's."""
    names: list[str] = []
    for prompt in prompts:
        name, again = prompt, 1
        while name in names:
            again += 1
            name = f"{prompt} ({again})"
        names.append(name)
    return names
