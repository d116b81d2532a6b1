"""Pictures of a search, drawn without a display.

Figures are made without pyplot, whose backend is the user's. Names in them are text as it stands:
matplotlib would set what lies between two dollars as a formula.
"""

import os
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from astraea_jax import files
from astraea_jax.search.scoring import Evaluation

SUFFIXES = (".png", ".svg", ".pdf")

_LONGEST = 60
"""Letters of a name in a legend: a longer one leaves no room for the curves."""


def pareto(
    path: str | os.PathLike,
    points: Sequence[tuple[float, float]],
    marked: Mapping[str, tuple[float, float]],
    *,
    cost: str,
) -> None:
    """Error against cost of everything that was evaluated, and some points by name.

    Args:
      path: a .png, .svg or .pdf file.
      points: (cost, mean squared error) of each schedule.
      marked: name -> point, drawn large.
      cost: what the cost is, with its unit.
    """
    path = files.check_output(path, SUFFIXES)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    shown = np.array([point for point in points if np.isfinite(point[1])]).reshape(-1, 2)
    axes.scatter(shown[:, 0], shown[:, 1], s=8, alpha=0.4, label="evaluated")
    for name, point in marked.items():
        axes.scatter(*point, s=60, marker="*", label=_name(name))
    _finish(axes, cost)
    _save(figure, path)


def sensitivity(path: str | os.PathLike, errors: Mapping[str, Sequence[float]]) -> None:
    """Figure 5: error when one step alone is skipped, a line a prompt.

    Args:
      path: a .png, .svg or .pdf file.
      errors: prompt -> mean squared error for each step.
    """
    path = files.check_output(path, SUFFIXES)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for prompt, values in errors.items():
        drawn = np.asarray(values, np.float64)
        drawn[~(np.isfinite(drawn) & (drawn > 0))] = np.nan
        axes.plot(np.arange(1, len(drawn) + 1), drawn, "o-", ms=3, label=_name(prompt))
    _finish(axes, "the one step that is skipped", fontsize="x-small")
    _save(figure, path)


def _name(text: str) -> str:
    """A name for a legend: one line; those that begin with an underscore would be left out."""
    line = " ".join(text.split())
    line = line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."
    return f" {line}" if line.startswith("_") else line


def _finish(axes: Axes, across: str, **legend) -> None:
    """Labels and legend, none of them read as a formula."""
    axes.set_yscale("log")
    axes.set_xlabel(across, parse_math=False)
    axes.set_ylabel("mean squared error to the dense video", parse_math=False)
    for text in axes.legend(**legend).get_texts():
        text.set_parse_math(False)


def _save(figure: Figure, path: os.PathLike) -> None:
    """Writes the file; letters that the font does not have are drawn as boxes, unsaid."""
    with files.replacing(path) as partial, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(partial)


def points_of(evaluations: Sequence[Evaluation], cost, fitness) -> list[tuple[float, float]]:
    """(cost, fitness) of evaluations that were not stopped."""
    return [
        (float(cost(each.levels)), float(fitness(each))) for each in evaluations if not each.stopped
    ]
