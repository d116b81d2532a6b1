"""Time and memory of a population, in lanes and one after another."""

import concurrent.futures
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import start
from astraea_jax import checks, report, solvers
from astraea_jax.bench import options
from astraea_jax.bench.denoise import time_in_turn
from astraea_jax.cli.options import check_size
from astraea_jax.methods import METHODS
from astraea_jax.population import Scorer
from astraea_jax.population.lanes import can_run_in_lanes
from astraea_jax.schedule import LEVELS, check_steps
from astraea_ports import wan

PLANS = ("lanes", "map")


def mixed_population(steps: int, number: int, *, whole: bool) -> np.ndarray:
    """Random schedules whose budgets are spread evenly over 20 to 80 %, int8 [number, steps]."""
    rng = np.random.default_rng(0)
    budgets = np.linspace(0.2, 0.8, number)
    if whole:
        rows = np.zeros((number, steps), np.int8)
        for row, budget in zip(rows, budgets, strict=True):
            row[rng.permutation(np.arange(1, steps))[: round(budget * steps) - 1]] = LEVELS
    else:
        # Beta weights of mean `budget`: skipped, sparse and full steps in every schedule.
        shares = [rng.beta(budget, 1 - budget, steps) for budget in budgets]
        rows = np.rint(LEVELS * np.array(shares)).astype(np.int8)
    rows[:, 0] = LEVELS
    return rows


def command(
    *,
    output: pathlib.Path | None = None,
    candidates: int = 16,
    steps: int = 30,
    prompts: int = 1,
    methods: tuple[str, ...] = ("step-level-corrected", "astraea"),
    plans: tuple[str, ...] = PLANS,
    lanes: int = 8,
    rounds: int = 2,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    model: str = "tiny",
    revision: str | None = None,
) -> None:
    """Times the scoring of a population of mixed budgets in every way that there is.

    Args:
      output: A .json file for every number; the table is printed.
      candidates: Schedules in the population.
      steps: Of each.
      prompts: How many.
      methods: What computes the steps.
      plans: Of "lanes", which whole steps alone have, and "map".
      lanes: Schedules denoised at a time.
      rounds: How often each is timed.
      frames: Frames of the videos, 4k + 1; the model's default when left out.
      height: Pixels.
      width: Pixels.
      model: "tiny", a folder, or a hub id.
      revision: Of a hub id: a branch, a tag or a commit.
    """
    checks.whole("candidates", candidates, 1, options.MOST_VIDEOS)
    check_steps(steps)
    checks.whole("prompts", prompts, 1, options.MOST_VIDEOS)
    options.check_each("methods", methods, METHODS)
    options.check_each("plans", plans, PLANS)
    checks.whole("lanes", lanes, 1, options.MOST_VIDEOS)
    options.check_rounds(rounds)
    check_size(frames, height, width)
    options.check_output(output)
    pipeline = wan.Pipeline.from_pretrained(model, revision=revision, staged=False)
    shape = pipeline.latents_shape(*pipeline.size(frames, height, width))
    noise = jax.random.normal(jax.random.key(0), (prompts, *shape))
    context = pipeline.encode_text(["a video"] * prompts)
    rows = []
    for method in methods:
        levels = mixed_population(steps, candidates, whole=method.startswith("step-level"))
        chosen = METHODS[method]
        scorers = {
            plan: Scorer(
                pipeline.transformer, noise, context, method=chosen,
                solver=solvers.unipc(steps, shift=pipeline.shift), batch=candidates,
                guidance=pipeline.defaults.guidance, plan=plan, lanes=lanes,  # pyright: ignore
            )
            for plan in plans
            if plan == "map" or can_run_in_lanes(chosen)
        }  # fmt: skip
        with concurrent.futures.ThreadPoolExecutor() as pool:  # the compiler needs no GIL
            programs = list(pool.map(Scorer.compiled, scorers.values()))
        runs = [functools.partial(_run, scorer, levels) for scorer in scorers.values()]
        seconds = np.median(time_in_turn(runs, rounds), axis=0)
        errors = [scorer(levels) for scorer in scorers.values()]
        for plan, program, took, error in zip(scorers, programs, seconds, errors, strict=True):
            memory = program.memory_analysis()
            assert memory is not None, "every backend that JAX ships knows its memory"
            rows.append(
                {
                    "method": method,
                    "plan": plan,
                    "seconds": float(took),
                    "against": float(took / seconds[0]),
                    "temporary": report.human_bytes(memory.temp_size_in_bytes),
                    "difference": float(np.abs(error / errors[0] - 1).max()),
                }
            )
    print(report.markdown(rows, COLUMNS))
    if output is not None:
        report.write_json(output, {"environment": report.environment(), "rows": rows})


def _run(scorer: Scorer, levels: np.ndarray) -> None:
    jnp.asarray(scorer.latents(levels)).block_until_ready()


COLUMNS = {
    "method": "method",
    "plan": "plan",
    "seconds": "seconds",
    "against": "times the first",
    "temporary": "temporary memory",
    "difference": "largest relative difference of an error",
}


if __name__ == "__main__":
    start.run(command)
