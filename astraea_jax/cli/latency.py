"""Seconds of a step at each level: what a budget in seconds is counted in.

Time is not linear in tokens: keys and values of all of them are always computed, and small
products run below the machine's rate. So each level is measured, for one model, shape and device.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from astraea_jax import denoise as loop
from astraea_jax import solvers
from astraea_jax.bench.denoise import time_in_turn
from astraea_jax.methods import Method


def latency_table(
    pipeline: Any,
    size: tuple[int, int, int],
    method: Method,
    levels: Sequence[int],
    *,
    rounds: int = 5,
    guidance: float | None = None,
    context: jax.Array | None = None,
) -> dict[int, float]:
    """Seconds of one denoising step of one video at each level, guidance included.

    The driver is the static one, which `astraea generate` runs; every level is timed in turn,
    and the median over the rounds is taken.

    Args:
      pipeline: of `astraea_ports`.
      size: frames, height and width of the video.
      method: what computes the steps.
      levels: those to measure, 0..10.
      rounds: how often each is timed.
      guidance: scale, 1 or less for none; None is the model's own.
      context: text of one video, conditional row first; None encodes one.
    """
    model = pipeline.transformer
    shape = (1, *pipeline.latents_shape(*size))
    latents = jax.random.normal(jax.random.key(0), shape, jnp.float32)
    scale = pipeline.defaults.guidance if guidance is None else guidance
    guided = scale > 1
    if context is None:
        context = pipeline.encode_text(["a video"], "" if guided else None)
    settings = loop.Settings(method, model.geometry(latents.shape), 2 if guided else 1, False)
    solver = solvers.unipc(3, shift=pipeline.shift)
    row = jax.tree.map(lambda leaf: jnp.asarray(leaf[1]), solver)
    prepared, state = loop.start_static(model, latents, context, settings=settings)
    holder = [state]
    arguments = (jnp.int32(1), jnp.int32(3), jnp.float32(scale), jax.random.key(0))

    def step(level: int) -> None:
        holder[0], _ = loop.static_step(
            model, prepared, holder[0], row, jnp.int32(level), *arguments,
            settings=settings, mode=method.static_mode(level),
        )  # fmt: skip
        jax.block_until_ready(holder[0].latents)

    step(10)  # fills what a level below reuses
    seconds = time_in_turn([functools.partial(step, level) for level in levels], rounds)
    medians = np.median(seconds, axis=0)
    return {level: float(each) for level, each in zip(levels, medians, strict=True)}
