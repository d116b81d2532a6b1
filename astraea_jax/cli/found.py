"""What a search ends with: what its schedule costs, a picture, and what it is good for."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from astraea_jax import metrics
from astraea_jax.cli.subject import Subject
from astraea_jax.schedule import LEVELS, Schedule
from astraea_jax.search import plots
from astraea_jax.search.scoring import Evaluator
from astraea_jax.search.study import Generation


class Found(NamedTuple):
    """What a search ends with.

    Attributes:
      best: the schedule.
      generation: the last one.
      swaps: evaluations of the local refinement.
    """

    best: Schedule
    generation: Generation
    swaps: int


def cost_of(levels: Sequence[int], table: dict[int, float] | None) -> float:
    """Seconds by a table of step times, or the budget."""
    if table is None:
        return Schedule(tuple(levels)).budget
    return sum(table.get(level, table[LEVELS]) for level in levels)


def costs(best: Schedule, table: dict[int, float] | None) -> dict[str, float]:
    """The budget of a schedule, and its seconds and speed-up where steps were timed."""
    cost = {"budget": best.budget}
    if table is not None:
        cost["seconds"] = cost_of(best.levels, table)
        cost["speedup"] = best.steps * table[LEVELS] / cost["seconds"]
    return cost


def draw(path: pathlib.Path, evaluator: Evaluator, best: Schedule, table) -> None:
    """The Pareto plot of everything that is known."""
    points = plots.points_of(
        list(evaluator.known.values()), lambda levels: cost_of(levels, table), evaluator.fitness
    )
    found = cost_of(best.levels, table), evaluator.fitness(evaluator.known[best.levels])
    label = "seconds of denoising" if table else "budget: mean share of the tokens"
    plots.pareto(path, points, {"found": found}, cost=label)


def report(subject, table, evaluator, found: Found) -> None:
    """What was found and what it cost to find."""
    best = found.best
    tokens = subject.pipeline.transformer.geometry(subject.noise.shape).num_tokens
    print(f"levels: {' '.join(map(str, best.levels))}")
    print(f"realised budget: {best.realised_budget(tokens):.4f} of the tokens")
    if table is not None:
        cost = costs(best, table)
        print(
            f"by measured step times: {cost['seconds']:.3f} s of denoising, "
            f"{cost['speedup']:.2f} times faster than dense"
        )
    print(
        f"{len(evaluator.known)} schedules known, {evaluator.evaluations} computed now, "
        f"{found.swaps} of them swaps, {evaluator.rejected} discarded as not finite, "
        f"{found.generation.seconds:.0f} s of evolution"
    )


def measure(subject: Subject, best: Schedule) -> dict[str, float]:
    """Quality on the subject's prompts, which the search has not seen."""
    scorer = subject.scorer(lanes=1, batch=1, precision="highest")
    found, dense = scorer.latents(best.array()[None])[0], scorer.dense
    del scorer
    subject, psnr, ssim = subject.with_decoder(), [], []
    for index in range(len(subject.prompts)):
        pair = [
            metrics.to_uint8(np.asarray(subject.decode(latents[index : index + 1])[0]))
            for latents in (dense, found)
        ]
        psnr.append(metrics.psnr(*pair))
        ssim.append(metrics.ssim(*pair))
    # Identical videos have an infinite PSNR, which JSON has no number for.
    return {
        "psnr": float(np.mean(np.minimum(psnr, 100.0))),
        "psnr_worst": float(np.min(np.minimum(psnr, 100.0))),
        "ssim": float(np.mean(ssim)),
        "mse": metrics.mse(dense, found),
        "prompts": len(subject.prompts),
    }
