"""`astraea bench denoise`: seconds a step against the bound that the operations set.

Every program is warmed up first, then all are timed in turn, round after round, so that a drift of
the machine's speed meets all alike; a ratio is the median over rounds of the ratio within a round.
"""

import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from astraea_jax import denoise as loop
from astraea_jax import files, flops, report, solvers
from astraea_jax.methods import METHODS, Dense, Method
from astraea_jax.schedule import LEVELS, rows_at
from astraea_ports import wan

DYNAMIC_STEPS = 4


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
    """

    driver: str
    method: Method
    level: int
    run: Callable[[], None]
    steps: int
    peak: int
    compile: float


def command(
    *,
    model: str = "tiny",
    method: str = "astraea",
    levels: tuple[int, ...] = (10, 7, 5, 4, 3, 1),
    rounds: int = 15,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    output: pathlib.Path | None = None,
) -> None:
    """Times a step, dense and at each level, with both drivers, in one run.

    Args:
      model: "tiny", a folder, or a hub id.
      method: A method that computes some of the tokens.
      levels: Tenths of the tokens, 1..10.
      rounds: How often each is timed.
      frames: Frames of the video, 4k + 1; the model's default when left out.
      height: Pixels.
      width: Pixels.
      output: A .json file for every number.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if rounds < 1 or not levels or not all(1 <= level <= LEVELS for level in levels):
        raise ValueError(f"expected levels in 1..{LEVELS} and rounds of at least 1")
    if output is not None:
        files.check_output(output, (".json",))
    pipeline = wan.Pipeline.from_pretrained(model)
    size = pipeline.size(frames, height, width)
    cases = make_cases(pipeline, size, METHODS[method], levels)
    seconds = time_in_turn([case.run for case in cases], rounds)
    rows = summarise(cases, seconds, pipeline.workload(*size))
    rows += time_stages(pipeline, size, rounds)
    print(report.markdown(rows, COLUMNS))
    if output is not None:
        report.write_json(output, {"environment": report.environment(), "rows": rows})


COLUMNS = {
    "driver": "driver",
    "method": "method",
    "level": "level",
    "milliseconds": "ms a step",
    "speedup": "speed-up",
    "bound": "bound",
    "share": "of the bound",
    "peak": "peak memory",
    "compile": "compile s",
}


def make_cases(pipeline, size, method: Method, levels) -> list[Case]:
    """Compiled programs: the plain model first, then each level with each driver."""
    model = pipeline.transformer
    keys = jax.random.split(jax.random.key(0))
    latents = jax.random.normal(keys[0], (1, *pipeline.latents_shape(*size)))
    context = pipeline.encode_text(["a video"])
    solver = solvers.unipc(DYNAMIC_STEPS, shift=pipeline.shift)
    geometry = model.geometry(latents.shape)
    cases = []
    for driver in ("static", "dynamic"):
        for chosen, level in ((Dense(), LEVELS), *((method, level) for level in levels)):
            settings = loop.Settings(chosen, geometry, 2, trace=False)
            make = _static_case if driver == "static" else _dynamic_case
            cases.append(make(model, latents, context, solver, settings, level))
    return cases


def _static_case(model, latents, context, solver, settings, level: int) -> Case:
    """One donated step at a level, from the state that a dense step leaves."""
    prepared, state = loop.start_static(model, latents, context, settings=settings)
    row = jax.tree.map(lambda leaf: jnp.asarray(leaf[1]), solver)
    scale, key = jnp.float32(5.0), jax.random.key(0)

    def lower(level: int, state):
        mode = settings.method.static_mode(level)
        return loop.static_step.lower(
            model, prepared, state, row, jnp.int8(level), jnp.int32(1), scale, key,
            settings=settings, mode=mode,
        )  # fmt: skip

    began = time.perf_counter()
    program = lower(level, state).compile()
    compile_seconds = time.perf_counter() - began
    dense = program if level == LEVELS else lower(LEVELS, state).compile()
    arguments = (row, jnp.int8(level), jnp.int32(1), scale, key)
    holder = [dense(model, prepared, state, *arguments)[0]]

    def run() -> None:
        holder[0] = jax.block_until_ready(program(model, prepared, holder[0], *arguments)[0])

    return Case("static", settings.method, level, run, 1, _peak(program), compile_seconds)


def _dynamic_case(model, latents, context, solver, settings, level: int) -> Case:
    """The whole loop: a dense step, then steps at a level."""
    levels = np.array([LEVELS] + [level] * (solver.steps - 1), np.int8)
    arguments = (model, latents, context, solver, levels, jnp.float32(5.0), jax.random.key(0))
    began = time.perf_counter()
    program = _dynamic_program(arguments, settings)
    compile_seconds = time.perf_counter() - began

    def run() -> None:
        jax.block_until_ready(program(*arguments))

    return Case(
        "dynamic", settings.method, level, run, solver.steps, _peak(program), compile_seconds
    )


_programs: dict[Any, Any] = {}


def _dynamic_program(arguments, settings):
    """One program for all levels of a method, which is what the driver is for."""
    if settings not in _programs:
        lowered = loop.dynamic_loop.lower(*arguments, settings=settings, report=False)
        _programs[settings] = lowered.compile()
    return _programs[settings]


def _peak(program) -> int:
    memory = program.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return held + memory.temp_size_in_bytes - memory.alias_size_in_bytes


def time_in_turn(runs: list[Callable[[], None]], rounds: int) -> np.ndarray:
    """Seconds of each run in each round, [rounds, runs]; a warm-up round is not counted."""
    seconds = np.zeros((rounds + 1, len(runs)))
    for turn in range(rounds + 1):
        for index, run in enumerate(runs):
            began = time.perf_counter()
            run()
            seconds[turn, index] = time.perf_counter() - began
    return seconds[1:]


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
        rows.append(
            {
                "driver": case.driver,
                "method": case.method.name,
                "level": case.level,
                "rows": rows_at(case.level, workload.num_tokens),
                "milliseconds": 1e3 * float(np.median(per_step[:, index])),
                "speedup": speedup,
                "bound": bound,
                "share": speedup / bound,
                "peak": report.human_bytes(case.peak),
                "compile": case.compile,
            }
        )
    return rows


def time_stages(pipeline, size, rounds: int) -> list[dict]:
    """The stages beside denoising: text and the VAE's decoding."""
    latents = jax.random.normal(jax.random.key(1), (1, *pipeline.latents_shape(*size)))
    decode = jax.jit(lambda vae, latents: vae.decode(latents))
    stages = {
        "text": functools.partial(pipeline.encode_text, ["a video"]),
        "decode": lambda: jax.block_until_ready(decode(pipeline.vae, latents)),
    }
    seconds = time_in_turn(list(stages.values()), min(rounds, 5))
    return [
        {"driver": name, "milliseconds": 1e3 * float(np.median(seconds[:, index]))}
        for index, name in enumerate(stages)
    ]
