"""What keeps a GPU busy with a small model: more prompts at once.

Alone, a small model's step is many short kernels with gaps between them. More videos a batch fill
both; the share of the time in which a kernel runs, and the kernels a step, say how far.
"""

import functools
import pathlib
import time
from typing import get_args

import jax
import numpy as np

import start
from astraea_jax import checks, report, solvers
from astraea_jax import denoise as loop
from astraea_jax.bench import options
from astraea_jax.bench import profile as profiles
from astraea_jax.cli.options import RESIDENT, Chosen
from astraea_jax.methods import METHODS
from astraea_jax.schedule import Schedule

COLUMNS = {
    "method": "method",
    "budget": "budget",
    "driver": "driver",
    "batch": "videos at once",
    "seconds": "s a video",
    "speedup": "to dense",
    "busy": "GPU busy, %",
    "launches": "kernels a step",
    "compile": "compile s",
}


def command(
    *,
    model: Chosen = RESIDENT,
    method: str = "astraea",
    budgets: tuple[float, ...] = (0.5,),
    batches: tuple[int, ...] = (1, 8, 32),
    drivers: tuple[loop.Driver, ...] = ("static", "dynamic"),
    rounds: int = 3,
    output: pathlib.Path | None = None,
) -> None:
    """Times whole runs of denoising at several batch sizes, dense and at budgets.

    Args:
      model: Which model.
      method: What runs the budgets.
      budgets: Mean shares of the tokens, after a first fifth that is dense.
      batches: Videos at once, each with two guidance branches.
      drivers: "static", "dynamic" or both.
      rounds: How often each is timed.
      output: A .json file for every number.
    """
    checks.one_of("method", method, tuple(METHODS))
    options.check_budgets(budgets)
    options.check_counts("batches", batches, options.MOST_VIDEOS)
    options.check_each("drivers", drivers, get_args(loop.Driver))
    options.check_rounds(rounds)
    options.check_output(output)
    pipeline = model.open()
    steps = pipeline.defaults.steps
    schedules: dict[tuple[str, float], Schedule | None] = {("dense", 1.0): None}
    for budget in budgets:
        schedules[method, budget] = Schedule.uniform(steps, budget, dense_steps=steps // 5)
    rows, dense = [], {}
    for batch in batches:
        for driver in drivers:
            for (name, budget), schedule in schedules.items():
                found = _measure(pipeline, name, schedule, driver, batch, rounds)
                key = dense.setdefault((batch, driver), found["seconds"])
                what = {"method": name, "budget": budget, "driver": driver, "batch": batch}
                rows.append(what | found | {"speedup": key / found["seconds"]})
                print(report.markdown(rows[-1:], COLUMNS).splitlines()[-1], flush=True)
    print(report.markdown(rows, COLUMNS))
    if output is not None:
        what = {"steps": steps, "dtype": pipeline.dtype}
        content = {"environment": report.environment(), "run": what, "rows": rows}
        report.write_json(output, content)


def _measure(pipeline, method: str, schedule, driver: loop.Driver, batch: int, rounds: int) -> dict:
    """One kind of run: seconds a video, and what the GPU does meanwhile."""
    steps = pipeline.defaults.steps
    shape = pipeline.latents_shape(*pipeline.size(None, None, None))
    noise = jax.random.normal(jax.random.key(0), (batch, *shape))
    context = pipeline.encode_text([f"a red circle {index}" for index in range(batch)])
    denoise = functools.partial(
        loop.denoise,
        pipeline.transformer,
        noise,
        context,
        solver=solvers.unipc(steps, shift=pipeline.shift),
        schedule=schedule,
        method=METHODS[method],
        guidance=5.0,
        driver=driver,
    )

    def run() -> None:
        jax.block_until_ready(denoise())

    began = time.perf_counter()
    run()
    first = time.perf_counter() - began
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    seconds = float(np.median(times))
    profile = profiles.record(run, 1)
    return {
        "seconds": seconds / batch,
        "compile": first - seconds,
        "busy": 100 * profile.busy / 1e3 / seconds,
        "launches": profile.launches / steps,
    }


if __name__ == "__main__":
    start.run(command)
