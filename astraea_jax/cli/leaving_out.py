"""What `astraea sensitivity` does: leave out each step by itself."""

import pathlib
import time
from collections.abc import Sequence

import numpy as np

from astraea_jax import checks, files, report
from astraea_jax.checks import Refusal
from astraea_jax.cli.options import MOST_LANES
from astraea_jax.cli.subject import Asked
from astraea_jax.schedule import LEVELS
from astraea_jax.search import plots


def run(asked: Asked, output: pathlib.Path, lanes: int) -> None:
    """Scores every schedule that leaves one step out; draws the curve and writes its numbers."""
    checks.whole("lanes", lanes, 1, MOST_LANES)
    numbers = output.with_suffix(".json")
    files.check_output(output, plots.SUFFIXES)
    files.check_output(numbers, (".json",))
    for path in (output, numbers):
        files.check_apart(path, asked.prompts)
    began = time.perf_counter()
    opened = asked.open()
    number = opened.solver.steps
    if number < 2:
        raise Refusal("the first step is never skipped: ask for at least 2 steps")
    subject = opened.load()
    rows = np.full((number - 1, number), LEVELS, np.int8)
    rows[np.arange(number - 1), np.arange(1, number)] = 0
    errors = np.concatenate([np.zeros((1, asked.count)), subject.scorer(lanes=lanes)(rows)])
    lines = {
        name: [float(value) for value in errors[:, index]]
        for index, name in enumerate(_names(subject.prompts))
    }
    report.write_json(numbers, {"mse": lines, "solver": asked.solver})
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
