"""`astraea bench denoise`: seconds a step against the bound that the operations set.

Every program is warmed up first, then all are timed in turn, round after round, so that a drift of
the machine's speed meets all alike; a ratio is the median over rounds of the ratio within a round.
"""

import functools
import math
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from astraea_jax import checks, flops, report, solvers
from astraea_jax import denoise as loop
from astraea_jax.bench import options
from astraea_jax.bench import profile as kernels
from astraea_jax.bench.programs import facts
from astraea_jax.cli.options import ModelChoice
from astraea_jax.methods import METHODS, Dense, Method
from astraea_jax.schedule import LEVELS

PROJECTED_STEPS = 50
"""Steps of the projection: the first dense, the rest at the level, all guidance branches."""

MOST_STEPS = 1000


class Case(NamedTuple):
    """A program to time.

    Attributes:
      driver: "static" or "dynamic".
      method: what it runs.
      level: tenths of the tokens at its steps.
      run: runs it once and blocks.
      steps: steps that one run takes.
      peak: bytes of its arguments, results and temporaries together.
      compile: seconds of compilation.
      copies: copies of the cache that the optimised program makes.
      cache: bytes of the method's state.
    """

    driver: str
    method: Method
    level: int
    run: Callable[[], None]
    steps: int
    peak: int
    compile: float
    copies: int
    cache: int


LONGEST = 1e7
"""Seconds of all rounds: months; no limit is inf."""


def run(
    model: ModelChoice,
    method: str,
    levels: Sequence[int],
    drivers: Sequence[loop.Driver],
    *,
    steps: int,
    rounds: int,
    seconds: float,
    size: tuple[int | None, int | None, int | None],
    stages: bool,
    profile: bool,
    output: pathlib.Path | None,
) -> None:
    """Times a step at each level, with each driver; arguments as of `cli.bench.denoise`."""
    options.check_levels(method, levels)
    options.check_each("drivers", drivers, get_args(loop.Driver))
    # Two at least, as the first one is dense.
    checks.whole("steps", steps, 2, MOST_STEPS)
    options.check_rounds(rounds)
    if seconds != math.inf:
        checks.number("seconds", seconds, 0, LONGEST, above=True)
    options.check_output(output)
    began = time.perf_counter()
    pipeline = model.open()
    say(f"model ready after {time.perf_counter() - began:.1f} s")
    shape = pipeline.size(*size)
    cases = make_cases(pipeline, shape, METHODS[method], levels, drivers, steps)
    timed = time_in_turn([case.run for case in cases], rounds, seconds)
    rows = summarise(cases, timed, pipeline.workload(*shape))
    if stages:
        rows += time_stages(pipeline, shape, min(rounds, 5), seconds)
    print(report.markdown(rows, COLUMNS))
    say(f"most memory held on the device: {device_peak()}")
    what = {"size": shape, "dtype": pipeline.dtype, "precision": model.precision}
    what |= {"most memory held": device_peak()}
    content = {"environment": report.environment(), "run": what, "rows": rows}
    if output is not None:
        report.write_json(output, content)
    if profile:
        content["profiles"] = [profiled(case) for case in cases]
        if output is not None:
            report.write_json(output, content)


def profiled(case: Case) -> dict:
    """Where the time of one run goes, said and returned."""
    found = kernels.record(case.run)
    what = {"driver": case.driver, "method": case.method.name, "level": case.level}
    print(f"\n{case.driver} {case.method.name} level {case.level}, {found.launches:.0f} kernels")
    print(report.markdown(found.kinds(), kernels.COLUMNS))
    return what | found._asdict() | {"kinds": found.kinds(), "kernels": found.kernels[:40]}


def say(line: str) -> None:
    """A line on stderr at once: a long run that is cut short has still said something."""
    print(f"{line}", file=sys.stderr, flush=True)


def device_peak() -> str:
    """The most bytes that the device's allocator held, where it counts them."""
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return "not counted here" if peak is None else report.human_bytes(peak)


COLUMNS = {
    "driver": "driver",
    "method": "method",
    "level": "level",
    "milliseconds": "ms a step",
    "speedup": "speed-up",
    "bound": "bound",
    "share": "of the bound",
    "peak": "peak memory",
    "cache": "cache / (L B N H 2 B)",
    "copies": "copies of it",
    "compile": "compile s",
    "projected": f"s for {PROJECTED_STEPS} steps",
}


def make_cases(pipeline, size, method: Method, levels, drivers, steps: int) -> list[Case]:
    """Compiled programs: the plain model first, then each level with each driver."""
    model = pipeline.transformer
    keys = jax.random.split(jax.random.key(0))
    latents = jax.random.normal(keys[0], (1, *pipeline.latents_shape(*size)))
    context = pipeline.encode_text(["a video"])
    solver = solvers.unipc(steps, shift=pipeline.shift)
    geometry = model.geometry(latents.shape)
    cases = []
    for driver in drivers:
        held: dict[Method, Any] = {}
        for chosen, level in ((Dense(), LEVELS), *((method, level) for level in levels)):
            settings = loop.Settings(chosen, geometry, 2, trace=False)
            arguments = (model, latents, context, solver, settings, level)
            if driver == "static":
                cases.append(_static_case(*arguments, held))
            else:
                cases.append(_dynamic_case(*arguments))
            case = cases[-1]
            say(f"{driver} {chosen.name} level {level}: compiled in {case.compile:.1f} s")
    return cases


def _static_case(model, latents, context, solver, settings, level: int, held: dict) -> Case:
    """One donated step at a level, from the state that a dense step leaves.

    The levels of a method pass one state on: at full size each would fill a tenth of a GPU.
    """
    prepared, state = loop.start_static(model, latents, context, settings=settings)
    row = jax.tree.map(lambda leaf: jnp.asarray(leaf[1]), solver)
    numbers = jnp.int32(1), jnp.int32(2), jnp.float32(5.0), jax.random.key(0)

    def lower(level: int, state):
        mode = settings.method.static_mode(level)
        return loop.static_step.lower(
            model, prepared, state, row, jnp.int32(level), *numbers, settings=settings, mode=mode
        )

    began = time.perf_counter()
    program = lower(level, state).compile()
    compile_seconds = time.perf_counter() - began
    arguments = (row, jnp.int32(level), *numbers)
    if settings.method not in held:
        dense = program if level == LEVELS else lower(LEVELS, state).compile()
        held[settings.method] = dense(model, prepared, state, *arguments)[0]

    def run() -> None:
        state = held[settings.method]
        held[settings.method] = program(model, prepared, state, *arguments)[0]
        jax.block_until_ready(held[settings.method])

    held_by = facts(program, state.method)
    return Case("static", settings.method, level, run, 1, compile=compile_seconds, **held_by)


def _dynamic_case(model, latents, context, solver, settings, level: int) -> Case:
    """The whole loop: a dense step, then steps at a level."""
    levels = np.array([LEVELS] + [level] * (solver.steps - 1), np.int8)
    arguments = (model, latents, context, solver, levels, jnp.float32(5.0), jax.random.key(0))
    began = time.perf_counter()
    program = _dynamic_program(arguments, settings)
    compile_seconds = time.perf_counter() - began

    def run() -> None:
        jax.block_until_ready(program(*arguments))

    state = jax.eval_shape(functools.partial(loop.start, model, latents, settings))
    held_by = facts(program, state.method)
    steps = solver.steps
    return Case("dynamic", settings.method, level, run, steps, compile=compile_seconds, **held_by)


_programs: dict[Any, Any] = {}


def _dynamic_program(arguments, settings):
    """One program for all levels of a method, which is what the driver is for."""
    if settings not in _programs:
        lowered = loop.dynamic_loop.lower(*arguments, settings=settings)
        _programs[settings] = lowered.compile()
    return _programs[settings]


def time_in_turn(runs: list[Callable[[], None]], rounds: int, most: float = math.inf) -> np.ndarray:
    """Seconds of each run in each round, [rounds, runs]; a warm-up round is not counted.

    No round but the first starts once `most` seconds have gone by.
    """
    began = time.perf_counter()
    seconds = [_round(runs)]
    while len(seconds) < 2 or (len(seconds) <= rounds and time.perf_counter() - began < most):
        seconds.append(_round(runs))
        said = ", ".join(f"{second:.3f}" for second in seconds[-1])
        if seconds[-1].sum() > 10:
            say(f"round {len(seconds) - 1}: {said} s")
    return np.array(seconds[1:])


def _round(runs: list[Callable[[], None]]) -> np.ndarray:
    seconds = np.zeros(len(runs))
    for index, run in enumerate(runs):
        began = time.perf_counter()
        run()
        seconds[index] = time.perf_counter() - began
    return seconds


def summarise(cases: list[Case], seconds: np.ndarray, workload: flops.Workload) -> list[dict]:
    """A row for each case; speed-ups are against the plain model with the same driver."""
    per_step = np.zeros_like(seconds)
    plain: dict[str, np.ndarray] = {}
    for index, case in enumerate(cases):
        if isinstance(case.method, Dense):
            plain[case.driver] = seconds[:, index] / case.steps
        # A dynamic run starts with a dense step; what is left is that of the steps at the level.
        rest = seconds[:, index] - (case.steps > 1) * plain[case.driver]
        per_step[:, index] = rest / max(case.steps - 1, 1)
    rows = []
    for index, case in enumerate(cases):
        bound = flops.speedup_bound(workload, case.level)
        speedup = float(np.median(plain[case.driver] / per_step[:, index]))
        dense, step = np.median(plain[case.driver]), np.median(per_step[:, index])
        rows.append(
            {
                "driver": case.driver,
                "method": case.method.name,
                "level": case.level,
                "rows": workload.rows_at(case.level),
                "milliseconds": 1e3 * float(step),
                "projected": float(dense + (PROJECTED_STEPS - 1) * step),
                "speedup": speedup,
                "bound": bound,
                "share": speedup / bound,
                "peak": report.human_bytes(case.peak),
                "cache": case.cache / cache_bytes(workload),
                "copies": case.copies,
                "compile": case.compile,
            }
        )
    return rows


def cache_bytes(workload: flops.Workload, branches: int = 2) -> int:
    """Two bytes for each channel of each token of each block and branch."""
    return workload.num_blocks * branches * workload.num_tokens * workload.width * 2


def time_stages(pipeline, size, rounds: int, most: float) -> list[dict]:
    """The stages beside denoising: text and the VAE's decoding."""
    latents = jax.random.normal(jax.random.key(1), (1, *pipeline.latents_shape(*size)))
    stages = {
        "text": functools.partial(pipeline.encode_text, ["a video"]),
        "decode": functools.partial(pipeline.decode, latents),
    }
    seconds = time_in_turn(list(stages.values()), rounds, most)
    return [
        {"driver": name, "milliseconds": 1e3 * float(np.median(seconds[:, index]))}
        for index, name in enumerate(stages)
    ]
