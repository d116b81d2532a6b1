"""`astraea sensitivity`: how much each step matters."""

import pathlib
import time

import numpy as np

from astraea_jax import files, report
from astraea_jax.bench.models import Dtype, ModelChoice
from astraea_jax.checks import Refusal
from astraea_jax.cli.subject import SearchMethod, SolverName, Subject
from astraea_jax.schedule import LEVELS
from astraea_jax.search import plots


def command(
    *,
    output: pathlib.Path = pathlib.Path("out.png"),
    model: str = "tiny",
    checkpoint: pathlib.Path | None = None,
    random: bool = False,
    dtype: Dtype | None = None,
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
      model: "tiny", "wan", "wan-14b", a folder in either layout, or a hub id.
      checkpoint: Folder or hub id of the weights of "wan" or "wan-14b",
      random: or random weights of their size.
      dtype: Of the weights; bfloat16 for "wan" and "wan-14b", else float32, when left out.
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
    if count < 1:
        raise Refusal(f"count must be at least 1; got {count}")
    began = time.perf_counter()
    size = (frames, height, width)
    choice = ModelChoice(model, checkpoint, random, dtype)
    subject = Subject.load(choice, prompts, 0, count, solver, steps, size, method)
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
    report.show(report.table(shown, {"step": "skipped step", "mse": "mean squared error"}))
    print(f"{number - 1} schedules in {time.perf_counter() - began:.1f} s")
    print(f"written: {output}, {output.with_suffix('.json')}")
