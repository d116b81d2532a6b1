"""What of a search study ships: for each solver and budget a schedule of whole steps."""

import pathlib
from collections.abc import Sequence

import astraea_jax
from astraea_jax import methods
from astraea_jax.model import fingerprint
from astraea_jax.schedule import Schedule
from astraea_jax.search.recipe import Recipe
from astraea_jax.search.space import WHOLE_STEPS


def chosen(rows: Sequence[dict]) -> dict[tuple[str, float], dict]:
    """The row that ships, by solver and budget; its method is the one that runs it.

    Of all schedules of whole steps that a search ended at, the one of least error on its validation
    prompts is taken, and of those without any the one of least error where it searched: levels
    between 0 and 10 cost more than their tokens (keys and values of all of them, a cache of them),
    and have not been better at equal tokens either. Schedules of another model are compared by the
    PSNR of the held-out prompts, which no search of theirs has seen.
    """
    best: dict[tuple, tuple] = {}
    for row in rows:
        method = _of_whole_steps(row)
        if not {"psnr", "ssim"} <= set(row) or method is None:
            continue
        if "fitness" not in row and not row["what"].startswith("transfer"):
            continue
        error = float(row.get("validation", row.get("fitness", 10 ** (-row["psnr"] / 10))))
        rank = "validation" not in row, error
        key = row["solver"], row["budget"]
        if key not in best or rank < best[key][0]:
            best[key] = rank, {**row, "method": method}
    return {key: row for key, (_, row) in sorted(best.items())}


def _of_whole_steps(row: dict) -> str | None:
    """The step-level method that runs a row's schedule, or None.

    A search of all levels may end at whole steps; then its method computes what the step-level one
    does, with a cache beside it that nothing reads.
    """
    if isinstance(methods.METHODS.get(row["method"]), methods.StepLevel):
        return row["method"]
    same = {"astraea-corrected": "step-level-corrected"}
    return same.get(row["method"]) if {*row["levels"]} <= {*WHOLE_STEPS} else None


def write_recipes(rows: Sequence[dict], pipeline, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes what ships, each with its judgement on held-out prompts, and returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for (solver, budget), row in chosen(rows).items():
        schedule = Schedule(tuple(row["levels"]))
        quality = {name: row[name] for name in ("psnr", "psnr_worst", "ssim", "mse")}
        recipe = Recipe(
            schedule,
            row["method"],
            solver,
            float(pipeline.shift),
            pipeline.grid,
            fingerprint(pipeline.transformer),
            {**quality, "prompts": len(row["psnr_each"])},
            {"budget": schedule.budget},
            astraea_jax.__version__,
        )
        paths.append(folder / f"{solver}_{schedule.steps}_{round(100 * budget)}.json")
        recipe.save(paths[-1])
    return paths
