"""`astraea bench training`: samples a second of a training step, against the device's own products.

The floor of a step is its products' operations (three times the forward pass's) at the rate that
the device reaches on one large product. The profile says where the rest goes, kernel by kernel.
"""

import pathlib
import time
from collections.abc import Sequence

import jax

from astraea_jax import checks, report
from astraea_jax.bench import options
from astraea_jax.bench import profile as profiles
from astraea_ports.tiny.training import (
    CPU_LAYOUTS,
    GPU_LAYOUTS,
    Layout,
    TransformerTraining,
    to_time,
)
from astraea_ports.training.recipe import MOST_CLIPS

COLUMNS = {
    "attention": "attention",
    "passes": "passes",
    "recompute": "recompute",
    "unroll": "unroll",
    "milliseconds": "ms a step",
    "rate": "samples/s",
    "share": "of the products' floor, %",
    "compile": "compile s",
    "loss": "loss in the end",
    "why": "not run because",
}
KERNELS = {"name": "kernel", "milliseconds": "ms a step", "share": "of the step, %"}


def run(
    model: str,
    revision: str | None,
    batch: int | None,
    steps: int,
    output: pathlib.Path | None,
) -> None:
    """Times training steps and profiles the fastest; arguments as of `cli.bench.training`."""
    checks.whole("steps", steps, 1, 100_000)
    if batch is not None:
        checks.whole("batch", batch, 1, MOST_CLIPS)
    options.check_output(output)
    gpu = jax.default_backend() == "gpu"
    if batch is None:
        batch = 128 * jax.device_count() if gpu else 2
    dtype = "bfloat16" if gpu else "float32"
    block = 32 * jax.device_count() if gpu else 2
    trainee = to_time(model, batch=batch, block=block, dtype=dtype, revision=revision)
    peak = product_rate(dtype, 8192 if gpu else 1024)
    trainee.pool.bring_to(0)  # `prepare` would compile a step too
    encoded = encode_rate(trainee)
    print(
        f"large products: {peak / 1e12:.1f} TFLOP/s; clips encoded: {encoded:.0f} a second",
        flush=True,
    )
    rows, kernels = _time_all(trainee, GPU_LAYOUTS if gpu else CPU_LAYOUTS, steps, peak)
    if output is not None:
        report.write_json(
            output,
            {
                "environment": report.environment(),
                "batch": batch,
                "peak": peak,
                "encoded": encoded,
                "rows": rows,
                "kernels": kernels,
            },
        )


def product_rate(dtype: str, size: int) -> float:
    """Operations a second of one large product."""
    matrix = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(lambda x: x @ matrix / size**0.5)
    jax.block_until_ready(product(product(matrix)))
    began, result = time.perf_counter(), matrix
    for _ in range(10):
        result = product(result)
    jax.block_until_ready(result)
    return 10 * 2 * size**3 / (time.perf_counter() - began)


def encode_rate(trainee: TransformerTraining) -> float:
    """Clips a second that are drawn and encoded into the pool."""
    trainee.pool.refresh_every = 1
    trainee.pool.bring_to(1)
    jax.block_until_ready(trainee.pool.arrays)
    began = time.perf_counter()
    count = 4
    for step in range(2, 2 + count):
        trainee.pool.bring_to(step)
    jax.block_until_ready(trainee.pool.arrays)
    trainee.pool.refresh_every = 0
    return count * trainee.pool.block / (time.perf_counter() - began)


def _time_all(
    trainee: TransformerTraining, layouts: Sequence[Layout], steps: int, peak: float
) -> tuple[list[dict], list[dict]]:
    """A row for each layout, and the kernels of the fastest; printed as they come."""
    rows: list[dict] = []
    kernels, best = [], 0.0
    for layout in layouts:
        row = layout._asdict() | _time(trainee, layout, steps, peak)
        rows.append(row)
        print("\n" + report.markdown([row], COLUMNS), flush=True)
        if row.get("rate", 0.0) > best:
            best, kernels = row["rate"], profile(trainee)
            print("\n" + report.markdown(kernels[:40], KERNELS), flush=True)
    print("\n" + report.markdown(rows, COLUMNS))
    return rows, kernels


def _time(trainee: TransformerTraining, layout: Layout, steps: int, peak: float) -> dict:
    trainee.layout = layout
    began = time.perf_counter()
    try:
        state, value = trainee.advance(trainee.start())
        jax.block_until_ready(value)
    except Exception as error:  # a layout that this device can't do is a row too
        return {"why": str(error).splitlines()[0][:100]}
    compiled = time.perf_counter() - began
    state, value = trainee.advance(state)
    jax.block_until_ready(value)
    began = time.perf_counter()
    for _ in range(steps):
        state, value = trainee.advance(state)
    jax.block_until_ready(value)
    seconds = (time.perf_counter() - began) / steps
    share = 100 * trainee.flops() / peak / len(trainee.mesh.devices.flat) / seconds
    return {
        "milliseconds": 1e3 * seconds,
        "rate": trainee.batch / seconds,
        "share": share,
        "compile": compiled,
        "loss": float(value),
    }


def profile(trainee: TransformerTraining) -> list[dict]:
    """Where a step's time goes: its kernels, the longest first; none where none are recorded."""
    held = [trainee.start()]

    def run() -> None:
        held[0], value = trainee.advance(held[0])
        jax.block_until_ready(value)

    kernels = profiles.record(run).kernels
    step = sum(kernel["milliseconds"] for kernel in kernels)
    return [kernel | {"share": 100 * kernel["milliseconds"] / step} for kernel in kernels]
