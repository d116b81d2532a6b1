"""`astraea bench exactness`: the rungs of exactness on this device, as numbers.

Bits are promised on a CPU in float32, where tests hold them. A GPU chooses its products anew for
each program and shape, so that here the same rungs are measured: relative to the dense video.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from astraea_jax import denoise as loop
from astraea_jax import files, report, solvers
from astraea_jax import model as core
from astraea_jax.attention import gather_rows
from astraea_jax.bench.models import Dtype, ModelChoice, Precision
from astraea_jax.methods import METHODS
from astraea_jax.schedule import Schedule

POLICIES: tuple[tuple[Dtype, Precision], ...] = (
    ("float32", "reference"),
    ("bfloat16", "reference"),
    ("bfloat16", "fast"),
)

STEPS = (10, 5, 3, 0, 7, 10)
"""Levels of the runs that are compared."""

COLUMNS = {
    "check": "check",
    "dtype": "dtype",
    "precision": "precision",
    "error": "largest difference / scale",
    "exact": "bit for bit",
}


def command(
    *,
    model: str = "tiny",
    methods: tuple[str, ...] = ("astraea", "astraea-published", "step-level"),
    frames: int | None = None,
    output: pathlib.Path | None = None,
) -> None:
    """Measures how exact this device is: budget 1, selected rows, drivers, batches.

    Args:
      model: "tiny", a folder, or a hub id.
      methods: Those that are held against the dense model.
      frames: Frames of the videos, 4k + 1; the model's default when left out.
      output: A .json file for every number.
    """
    if unknown := sorted(set(methods) - set(METHODS)):
        raise ValueError(f"expected methods of {', '.join(METHODS)}; got {', '.join(unknown)}")
    if output is not None:
        files.check_output(output, (".json",))
    rows = []
    for dtype, precision in POLICIES:
        exact = "highest" if dtype == "float32" else "default"
        with jax.default_matmul_precision(exact):
            rows += _rungs(model, methods, frames, dtype, precision)
    print(report.markdown(rows, COLUMNS))
    if output is not None:
        report.write_json(output, {"environment": report.environment(), "rows": rows})


def _rungs(
    model: str,
    methods: tuple[str, ...],
    frames: int | None,
    dtype: Dtype,
    precision: Precision,
) -> list[dict]:
    """A row for each check in one dtype."""
    pipeline = ModelChoice(model, dtype=dtype, precision=precision).open()
    transformer = pipeline.transformer
    shape = pipeline.latents_shape(*pipeline.size(frames, None, None))
    noise = jax.random.normal(jax.random.key(0), (2, *shape))
    context = pipeline.encode_text(["a red circle moving left", "a blue square"])
    one = context[jnp.array([0, 2])]

    def run(method: str, levels, driver: loop.Driver, latents=noise[:1], text=one):
        return loop.denoise(
            transformer,
            latents,
            text,
            solver=solvers.unipc(len(levels), shift=pipeline.shift),
            schedule=Schedule(levels),
            method=METHODS[method],
            guidance=5.0,
            driver=driver,
        ).latents

    full = (10,) * 4
    plain = run("dense", full, "static")
    pairs = {"rows of a block, half of them": _rows_of_a_block(transformer, noise[:1], one[:1])}
    pairs["dense: dynamic driver = static"] = (run("dense", full, "dynamic"), plain)
    for method in methods:
        for driver in ("static", "dynamic"):
            name = f"{method} at budget 1 = dense, {driver} driver"
            pairs[name] = (run(method, full, driver), run("dense", full, driver))
    for method in methods[:2]:
        static = run(method, STEPS, "static")
        pairs[f"{method}: dynamic driver = static"] = (run(method, STEPS, "dynamic"), static)
        both = run(method, STEPS, "static", noise, context)
        pairs[f"{method}: a batch = its video alone"] = (both[:1], static)
    return [
        {"check": name, "dtype": dtype, "precision": precision} | _difference(*pair)
        for name, pair in pairs.items()
    ]


def _rows_of_a_block(transformer, latents, context) -> tuple[Array, Array]:
    """Half of a block's rows computed alone, and the same rows computed with all others."""
    geometry = transformer.geometry(latents.shape)
    prepared = transformer.prepare(context, geometry)
    modulation = transformer.modulation(jnp.full((1,), 500.0))
    layer = jax.tree.map(lambda leaf: leaf[0], transformer.layers(prepared))
    (block,) = transformer.bind(layer, prepared, modulation)
    tokens = transformer.embed(latents)
    keys_values = block.keys_values(tokens)
    indices = jax.random.permutation(jax.random.key(1), geometry.num_tokens)[None, ::2]
    rows = gather_rows(tokens, indices)
    alone, _ = core.apply_block(block, rows, indices, keys_values)
    together, _ = core.apply_block(block, tokens, None, keys_values)
    return alone, gather_rows(together, indices)


def _difference(got: Array, expected: Array) -> dict:
    """The largest difference over the largest number, and whether there is any."""
    here, there = (np.asarray(each, np.float64) for each in (got, expected))
    error = np.abs(here - there).max() / np.abs(there).max()
    return {"error": float(error), "exact": bool((here == there).all())}
