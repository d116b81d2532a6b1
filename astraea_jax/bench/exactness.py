"""`astraea bench exactness`: the rungs of exactness on this device, as numbers.

Bits are promised on a CPU in float32, where tests hold them. A GPU chooses its products anew for
each program and shape, so that here the same rungs are measured: relative to the dense video.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterator
from concurrent import futures
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from astraea_jax import denoise as loop
from astraea_jax import model as core
from astraea_jax import report, solvers
from astraea_jax.attention import gather_rows
from astraea_jax.bench import options
from astraea_jax.cli.options import Dtype, ModelChoice, Precision, check_size
from astraea_jax.methods import METHODS
from astraea_jax.model import Rows
from astraea_jax.schedule import Schedule

POLICIES: tuple[tuple[Dtype, Precision], ...] = (
    ("float32", "reference"),
    ("bfloat16", "reference"),
    ("bfloat16", "fast"),
)

STEPS = (10, 5, 3, 0, 7, 10)
"""Levels of the runs that are compared."""

FULL = (10,) * len(STEPS)
"""Budget 1, in as many steps: one dynamic program serves both."""

COLUMNS = {
    "check": "check",
    "dtype": "dtype",
    "precision": "precision",
    "error": "largest difference / scale",
    "exact": "bit for bit",
}


def run(
    model: str,
    revision: str | None,
    methods: tuple[str, ...],
    frames: int | None,
    output: pathlib.Path | None,
) -> None:
    """Measures how exact this device is; arguments as of `cli.bench.exactness`."""
    options.check_each("methods", methods, METHODS)
    check_size(frames, None, None)
    options.check_output(output)
    rows = []
    pool = futures.ThreadPoolExecutor(os.cpu_count())
    try:
        choice = ModelChoice(model=model, revision=revision, staged=False)
        studies = [Study(pool, choice, methods, frames, *policy) for policy in POLICIES]
        for study in studies:
            for name, pair in study.pairs():
                rows.append(study.labels | {"check": name} | _difference(*pair))
                print(_line(rows[-1]), flush=True)
                if output is not None:  # after each row, so that a run cut short leaves the others
                    content = {"environment": report.environment(), "rows": rows}
                    report.write_json(output, content)
    finally:
        pool.shutdown(cancel_futures=True)
    print(report.markdown(rows, COLUMNS))


def _line(row: dict) -> str:
    """A row, as soon as it is known."""
    same = "bit for bit" if row["exact"] else f"off by {row['error']:.2g}"
    return f"{row['dtype']}, {row['precision']}: {row['check']}: {same}"


class Study:
    """The runs of one dtype, all under way from the start, side by side: XLA compiles in parallel.

    What shares a program is one task, or it would be compiled twice.
    """

    def __init__(
        self,
        pool: futures.Executor,
        model: ModelChoice,
        methods: tuple[str, ...],
        frames: int | None,
        dtype: Dtype,
        precision: Precision,
    ):
        self.labels = {"dtype": dtype, "precision": precision}
        self.products = "highest" if dtype == "float32" else "default"
        self.pipeline = dataclasses.replace(model, dtype=dtype, precision=precision).open()
        shape = self.pipeline.latents_shape(*self.pipeline.size(frames, None, None))
        self.noise = jax.random.normal(jax.random.key(0), (2, *shape))
        self.context = self.pipeline.encode_text(["a red circle moving left", "a blue square"])
        self.methods = methods
        self.rows = pool.submit(self._rows)
        self.runs = {
            (method, driver): pool.submit(self._runs, method, driver)
            for method in dict.fromkeys(("dense", *methods))
            for driver in get_args(loop.Driver)
        }
        self.batches = {method: pool.submit(self._batch, method) for method in methods[:2]}

    def pairs(self) -> Iterator[tuple[str, tuple[Array, Array]]]:
        """Each check and the two arrays that it compares."""

        def latents(method: str, driver: loop.Driver, which: int = 0) -> Array:
            return self.runs[method, driver].result()[which]

        yield "rows of a block, half of them", self.rows.result()
        pair = latents("dense", "dynamic"), latents("dense", "static")
        yield "dense: dynamic driver = static", pair
        for method in self.methods:
            for driver in get_args(loop.Driver):
                name = f"{method} at budget 1 = dense, {driver} driver"
                yield name, (latents(method, driver), latents("dense", driver))
        for method in self.methods[:2]:
            static = latents(method, "static", 1)
            yield f"{method}: dynamic driver = static", (latents(method, "dynamic", 1), static)
            batch = self.batches[method].result()
            yield f"{method}: a batch = its video alone", (batch[:1], static)

    def _rows(self) -> tuple[Array, Array]:
        with jax.default_matmul_precision(self.products):
            return _rows_of_a_block(self.pipeline.transformer, self.noise[:1], self.context[:1])

    def _runs(self, method: str, driver: loop.Driver) -> list[Array]:
        """Latents at budget 1 and, of the methods that are held to it, at `STEPS`."""
        schedules = (FULL, STEPS) if method in self.methods[:2] else (FULL,)
        one = self.context[jnp.array([0, 2])]
        return [self._run(method, levels, driver, self.noise[:1], one) for levels in schedules]

    def _batch(self, method: str) -> Array:
        return self._run(method, STEPS, "static", self.noise, self.context)

    def _run(self, name: str, levels, driver: loop.Driver, noise, context) -> Array:
        """Latents of a run; the context of a thread is its own."""
        with jax.default_matmul_precision(self.products):
            return loop.denoise(
                self.pipeline.transformer,
                noise,
                context,
                solver=solvers.unipc(len(levels), shift=self.pipeline.shift),
                schedule=Schedule(levels),
                method=METHODS[name],
                guidance=5.0,
                driver=driver,
            ).latents


def _rows_of_a_block(transformer, latents, context) -> tuple[Array, Array]:
    """Half of a block's rows computed alone, and the same rows computed with all others."""
    geometry = transformer.geometry(latents.shape)
    prepared = transformer.prepare(context, geometry)
    modulation = transformer.modulation(jnp.full((1,), 500.0), prepared)
    layer = jax.tree.map(lambda leaf: leaf[0], transformer.layers(0, prepared))
    block = transformer.bind(0, layer, prepared, modulation)[0]
    tokens, side = transformer.embed(latents, prepared)
    shared, _ = block.shared(Rows(tokens), side)
    indices = jax.random.permutation(jax.random.key(1), geometry.num_tokens)[None, ::2]
    rows = gather_rows(tokens, indices)
    alone = core.apply_block(block, Rows(rows, indices), shared)
    together = core.apply_block(block, Rows(tokens), shared)
    return alone.rows, gather_rows(together.rows, indices)


def _difference(got: Array, expected: Array) -> dict:
    """The largest difference over the largest number, and whether there is any."""
    here, there = (np.asarray(each, np.float64) for each in (got, expected))
    error = np.abs(here - there).max() / np.abs(there).max()
    return {"error": float(error), "exact": bool((here == there).all())}
