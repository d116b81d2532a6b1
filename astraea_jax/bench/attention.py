"""`astraea bench attention`: every implementation that runs here, side by side, checked first.

All are checked against float64 on inputs that are new at every run, then timed in turn, round after
round, so that a drift of the machine's speed meets all alike. One that fails is reported and left
out; the rest goes on.
"""

import functools
import itertools
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from astraea_jax import attention, report
from astraea_jax.attention import query_sparse_attention
from astraea_jax.bench import options
from astraea_jax.bench.attention_runs import (
    by_hand,
    compile_all,
    inputs,
    poison,
    sampled_errors,
    short,
    time_runs,
)
from astraea_jax.bench.attention_tuning import tune_shape
from astraea_jax.bench.shapes import SHAPES, Shape, rows
from astraea_jax.kernels import machine, tilings

CHECKED = (  # batch, queries, keys, heads, width, count: what is uneven, empty, short or long
    (1, 130, 150, 2, 128, (129,)),
    (2, 100, 300, 2, 72, (100, 0)),
    (3, 64, 257, 1, 64, (64, 1, 63)),
    (1, 1, 1, 1, 96, (1,)),
    (2, 15, 30, 3, 72, (15, 7)),
    (1, 200, 4099, 1, 128, (200,)),
)
LIMIT = 1e-6  # of the largest value, for all that is rounded to float32
LSE_LIMITS = {"bfloat16": 1e-5, "float16": 1e-5, "float32": 1e-6}


def run(
    shapes: Sequence[str],
    shares: Sequence[float],
    implementations: Sequence[attention.Implementation],
    *,
    rounds: int,
    tune: bool,
    output: pathlib.Path | None,
) -> None:
    """Checks and times query-only attention; arguments as of `cli.bench.attention`."""
    smallest = min(SHAPES, key=lambda name: SHAPES[name].flops(SHAPES[name].tokens))
    shapes = shapes or (tuple(SHAPES) if machine.gpu() else (smallest,))
    names: Sequence[Any] = implementations or get_args(attention.Implementation)
    options.check_each("shapes", shapes, SHAPES)
    options.check_shares("shares", shares)
    options.check_each("implementations", names, get_args(attention.Implementation))
    options.check_rounds(rounds)
    options.check_output(output)
    if tune:
        tilings.check_writable()
    states = attention.implementations()
    for name in names:
        if states[name] != "runs":
            print(f"{name}: {states[name]}")
    names = [name for name in names if states[name] == "runs"]
    kernels = [name for name in names if name in ("mosaic", "triton")]
    tuned = [tune_shape(SHAPES[name], shares, rounds, kernels) for name in shapes] if tune else []
    checks = check_all(names)
    print(report.markdown(checks, CHECK_COLUMNS), flush=True)
    timings = []
    for name in shapes:
        timings += (found := time_shape(name, SHAPES[name], shares, names, rounds))
        print(report.markdown(found, COLUMNS), flush=True)
    wrong = [row for row in checks if row["verdict"] != "right"]
    print(f"checks: {len(checks) - len(wrong)} of {len(checks)} right")
    if output is not None:
        content = {"environment": report.environment(), "checks": checks, "timings": timings}
        report.write_json(output, content | {"tilings": list(itertools.chain(*tuned))})


CHECK_COLUMNS = {
    "implementation": "implementation",
    "dtype": "dtype",
    "case": "B, K, N, A, C, count",
    "out": "error of out",
    "lse": "error of lse",
    "verdict": "verdict",
}
COLUMNS = {
    "shape": "shape",
    "queries": "K",
    "implementation": "implementation",
    "milliseconds": "ms",
    "teraflops": "TFLOP/s",
    "ratio": "time(K)/time(N)",
    "share": "K/N",
    "floor": "ms, floor of an H200",
    "without_lse": "ms, no LSE",
    "out": "error of out",
    "lse": "error of lse",
    "failed": "failed",
}


def _cases(name: str) -> Iterable[tuple[str, tuple]]:
    dtypes = ("bfloat16", "float16", *(("float32",) if name == "xla" else ()))
    return itertools.product(dtypes, CHECKED)


def check_all(names: Iterable[attention.Implementation]) -> list[dict[str, Any]]:
    """Every implementation on every small case; rows of the table."""
    problems = {}
    for name in names:
        for dtype, case in _cases(name):
            arrays = inputs(*case[:-1], dtype=dtype)
            problems[name, dtype, case] = (*arrays, jnp.asarray(case[-1], jnp.int32))

    def maker(key):
        attend = functools.partial(query_sparse_attention, implementation=key[0])
        run = jax.jit(lambda q, k, v, count: attend(q, k, v, count=count))
        return lambda: run.lower(*problems[key]).compile()

    programs = compile_all({key: maker(key) for key in problems})
    return [check(key, program, problems[key]) for key, program in programs.items()]


def check(key: tuple, program, arguments: tuple) -> dict[str, Any]:
    """One compiled implementation against float64; a row of the table."""
    name, dtype, case = key
    q, k, v, count = arguments
    row: dict[str, Any] = {"implementation": name, "dtype": dtype, "case": str(case)[1:-1]}
    try:
        if isinstance(program, Exception):
            raise program
        poison(q, q, q)
        out, lse = jax.block_until_ready(program(*arguments))
    except Exception as error:  # whatever a compiler or driver says, the others are to run
        return row | {"verdict": short(error)}
    expected, expected_lse = by_hand(q, k, v, q.shape[-1] ** -0.5)
    allowed = _allowed(q, k, v, expected)
    used = np.arange(q.shape[1]) < np.asarray(count)[:, None]
    out, lse = (np.asarray(x.astype(jnp.float32), np.float64) for x in (out, lse))
    errors = np.abs(out - expected)
    row["out"] = float(errors[used].max(initial=0.0))
    lse, expected_lse = lse.swapaxes(1, 2), expected_lse.swapaxes(1, 2)
    row["lse"] = float(np.abs(lse - expected_lse)[used].max(initial=0.0))
    empty = not out[~used].any() and (lse[~used] == -np.inf).all()
    close = row["lse"] <= LSE_LIMITS[dtype] * max(1.0, np.abs(expected_lse).max())
    close = close and (errors <= allowed)[used].all()
    return row | {"verdict": ("right" if close else "wrong") + ("" if empty else ", rows past")}


def _allowed(q, k, v, expected: np.ndarray) -> np.ndarray:
    """How far each output may be off: its weights are rounded to its dtype, then it is itself.

    So says the analysis of rounding, for any inputs; a limit that chance inputs mostly keep would
    call a right kernel wrong every so often.
    """
    magnitudes, _ = by_hand(q, k, abs(v), q.shape[-1] ** -0.5)
    # What a dtype of 16 bits adds to float32, which has its limit already.
    rounding = float(jnp.finfo(v.dtype).eps - jnp.finfo(jnp.float32).eps) / 2
    in_float32 = LIMIT * max(1.0, float(jnp.abs(v).max()))
    return rounding * (magnitudes + np.abs(expected)) + in_float32


def time_shape(name, shape: Shape, shares, implementations, rounds: int) -> list[dict[str, Any]]:
    """A row for each share of the queries and each implementation."""
    q, k, v = inputs(shape.batch, shape.tokens, *shape[1:])
    queries = {share: q[:, : rows(shape, share)] for share in sorted({1.0, *shares}, reverse=True)}

    def maker(implementation, share, lse):
        def attend(q, k, v):
            both = query_sparse_attention(q, k, v, implementation=implementation)
            return both if lse else both[0]

        return lambda: jax.jit(attend).lower(queries[share], k, v).compile()

    programs = compile_all(
        {
            (implementation, share, lse): maker(implementation, share, lse)
            for implementation in implementations
            for share in queries
            for lse in ((True, False) if share == 1.0 else (True,))
        }
    )
    runs = {
        key: functools.partial(program, queries[key[1]], k, v)
        for key, program in programs.items()
        if not isinstance(program, Exception)
    }
    seconds, failed = time_runs(runs, rounds)
    failed |= {key: error for key, error in programs.items() if isinstance(error, Exception)}
    result = []
    for share, implementation in itertools.product(queries, implementations):
        key = (implementation, share, True)
        used = queries[share].shape[1]
        row = {"shape": name, "queries": used, "implementation": implementation}
        row |= {"share": used / shape.tokens, "floor": 1e3 * shape.floor(used)}
        if key in failed:
            result.append(row | {"failed": short(failed[key])})
            continue
        row["milliseconds"] = 1e3 * seconds[key]
        row["teraflops"] = shape.flops(used) / seconds[key] / 1e12
        row["ratio"] = seconds[key] / seconds.get((implementation, 1.0, True), np.nan)
        without = seconds.get((implementation, share, False))
        row["without_lse"] = None if without is None else 1e3 * without
        result.append(row | sampled_errors(runs[key](), queries[share], k, v))
    return result
