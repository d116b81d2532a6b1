"""Pictures of a search, drawn without a display."""

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from astraea_jax import files
from astraea_jax.search.scoring import Evaluation

SUFFIXES = (".png", ".svg", ".pdf")


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
        axes.scatter(*point, s=60, marker="*", label=name)
    axes.set_yscale("log")
    axes.set_xlabel(cost)
    axes.set_ylabel("mean squared error to the dense video")
    axes.legend()
    with files.replacing(path) as partial:
        figure.savefig(partial)


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
        steps = np.arange(1, len(values) + 1)
        axes.plot(steps, np.where(np.asarray(values) > 0, values, np.nan), "o-", ms=3, label=prompt)
    axes.set_yscale("log")
    axes.set_xlabel("the one step that is skipped")
    axes.set_ylabel("mean squared error to the dense video")
    axes.legend(fontsize="x-small")
    with files.replacing(path) as partial:
        figure.savefig(partial)


def points_of(evaluations: Sequence[Evaluation], cost, fitness) -> list[tuple[float, float]]:
    """(cost, fitness) of evaluations that were not stopped."""
    return [
        (float(cost(each.levels)), float(fitness(each))) for each in evaluations if not each.stopped
    ]
