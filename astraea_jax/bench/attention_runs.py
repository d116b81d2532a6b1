"""Inputs, errors, compiled programs and times, for the bench of attention."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SECONDS_A_RUN = 0.02  # calls are queued for about so long before the clock is read


def inputs(
    batch: int, queries: int, keys: int, heads: int, width: int, dtype: str = "bfloat16"
) -> list[jax.Array]:
    """Normal q, k, v that nobody has seen before."""
    seed = int.from_bytes(np.random.default_rng().bytes(4), "little")
    sizes = [(batch, length, heads, width) for length in (queries, keys, keys)]
    each = jax.random.split(jax.random.key(seed), 3)
    return [jax.random.normal(key, size, dtype) for key, size in zip(each, sizes, strict=True)]


def by_hand(q, k, v, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Softmax attention in float64, on the host: (out, lse)."""
    q, k, v = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v))
    logits = np.einsum("bkac,bnac->bakn", q, k, optimize=True) * scale
    largest = logits.max(-1, keepdims=True)
    weights = np.exp(logits - largest)
    total = weights.sum(-1, keepdims=True)
    out = np.einsum("bakn,bnac->bkac", weights / total, v, optimize=True)
    return out, (largest + np.log(total))[..., 0]


def poison(*arrays: jax.Array) -> None:
    """Fills memory of these sizes with NaN and gives it back, for the next results to lie in."""
    jax.block_until_ready([jnp.full(array.shape, jnp.nan, array.dtype) for array in arrays])


def sampled_errors(results, q, k, v) -> dict[str, float]:
    """Errors of some rows of a large result against float64."""
    out, lse = results
    picked = np.unique(np.linspace(0, q.shape[1] - 1, 7).astype(int))
    heads = np.unique([0, q.shape[2] - 1])
    take = lambda x: x[:1][:, :, heads]  # noqa: E731
    expected, expected_lse = by_hand(take(q)[:, picked], take(k), take(v), q.shape[-1] ** -0.5)
    out = np.asarray(take(out)[:, picked].astype(jnp.float32))
    lse = np.asarray(lse[:1][:, heads][:, :, picked])
    return {
        "out": float(np.abs(out - expected).max()),
        "lse": float(np.abs(lse - expected_lse).max()),
    }


def compile_all(makers: dict[Any, Callable[[], Any]]) -> dict[Any, Any]:
    """Compiles side by side; an error stands in the place of what it kept from being made."""

    def attempt(make):
        try:
            return make()
        except Exception as error:
            return error

    with ThreadPoolExecutor() as pool:
        return dict(zip(makers, pool.map(attempt, makers.values()), strict=True))


def time_runs(runs: dict[Any, Callable], rounds: int) -> tuple[dict[Any, float], dict]:
    """Median seconds of a call of each, timed in turn, and the errors of those that failed."""
    calls, failed = {}, {}
    for key, run in runs.items():
        try:
            jax.block_until_ready(run())
            began = time.perf_counter()
            jax.block_until_ready(run())
            estimate = time.perf_counter() - began
            calls[key] = max(1, min(100, round(SECONDS_A_RUN / estimate)))
        except Exception as error:
            failed[key] = error
    seconds: dict[Any, list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, number in calls.items():
            began = time.perf_counter()
            for _ in range(number):
                last = runs[key]()
            jax.block_until_ready(last)
            seconds[key].append((time.perf_counter() - began) / number)
    return {key: float(np.median(values)) for key, values in seconds.items()}, failed


def short(error: Exception) -> str:
    """What an error says first."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"
