"""What a pipeline is asked for, checked before any long work."""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from astraea_jax import solvers
from astraea_jax.checks import Refusal
from astraea_jax.methods import Dense, Method
from astraea_jax.methods.base import seeded
from astraea_jax.schedule import Schedule
from astraea_ports.wan.config import TransformerConfig
from astraea_ports.wan.text import Tokenizer
from astraea_ports.wan.vae import VAEConfig

OURS = str(Path(__file__).parents[1])
"""A warning points at the first line that is not of this package."""


class Plan(NamedTuple):
    """A call, checked and with its defaults filled in.

    Attributes:
      prompts: P of them.
      negative_prompt: what the unconditional branch reads, or None for no such branch.
      noise: to start from.
      solver: the table of T steps.
      schedule: a level for each.
      method: how steps are computed.
      guidance: scale of classifier-free guidance, or None.
      seed: for methods that draw.
    """

    prompts: list[str]
    negative_prompt: str | None
    noise: Float[Array, "P f h w C"]
    solver: solvers.Solver
    schedule: Schedule
    method: Method
    guidance: float | None
    seed: int


def make(
    prompts: Sequence[str],
    tokenizer: Tokenizer,
    shape: tuple[int, int, int, int],
    *,
    steps: int,
    solver: str,
    shift: float,
    grid: solvers.Grid,
    schedule: Schedule | None,
    method: Method | None,
    guidance: float,
    negative_prompt: str,
    seed: int,
    latents: Float[Array, "B f h w C"] | None,
) -> Plan:
    """Checks a call; `shape` is that of one video's latents, the rest as of the call.

    Raises:
      Refusal: anything out of range.
    """
    check_prompts(prompts, tokenizer)
    table = solvers.make(solver, steps, shift=shift, grid=grid)
    schedule = Schedule.dense(steps) if schedule is None else schedule
    if schedule.steps != steps:
        raise Refusal(
            f"expected a schedule of {steps} levels, one a solver step; got {schedule.steps}"
        )
    if not math.isfinite(guidance):
        raise Refusal(f"guidance must be a finite number, 1 or less for none; got {guidance}")
    return Plan(
        prompts=list(prompts),
        negative_prompt=negative_prompt if guidance > 1 else None,
        noise=make_noise(len(prompts), shape, seed, latents),
        solver=table,
        schedule=schedule,
        method=Dense() if method is None else method,
        guidance=guidance if guidance > 1 else None,
        seed=seed,
    )


def check_size(
    size: tuple[int, int, int], image: VAEConfig, transformer: TransformerConfig
) -> None:
    """Refuses frames, height and width that a model can't do; the message says the nearest."""
    patch = transformer.patch_size
    pixels = image.spatial_factor * patch[1], image.spatial_factor * patch[2]
    for name, value, unit in (("height", size[1], pixels[0]), ("width", size[2], pixels[1])):
        if not isinstance(value, int) or value < unit or value % unit:
            raise Refusal(
                f"{name} must be a multiple of {unit} pixels; got {value!r}: the nearest is "
                f"{max(unit, unit * round(float(value) / unit))}"
            )
    time = image.temporal_factor
    if not isinstance(size[0], int) or size[0] < 1 or (size[0] - 1) % time:
        nearest = max(1, time * round((float(size[0]) - 1) / time) + 1)
        raise Refusal(
            f"frames must be a multiple of {time} plus 1; got {size[0]!r}: the nearest is {nearest}"
        )


def check_prompts(prompts: Sequence[str], tokenizer: Tokenizer) -> None:
    """Refuses prompts that say nothing.

    Warns:
      UserWarning: words that the model can only spell.
    """
    if not prompts:
        raise Refusal("expected at least one prompt; got none")
    for prompt in prompts:
        if not isinstance(prompt, str) or not prompt.strip():
            raise Refusal(
                f"a prompt must say something; got {prompt!r}: describe the video to make"
            )
    unknown = [word for prompt in prompts for word in tokenizer.unknown_words(prompt)]
    if unknown:
        warnings.warn(
            f"the model does not know: {', '.join(dict.fromkeys(unknown))}; "
            "it can only spell such words, and the video may not show them",
            skip_file_prefixes=(OURS,),
        )


def make_noise(
    count: int,
    shape: tuple[int, int, int, int],
    seed: int,
    latents: Float[Array, "B f h w C"] | None,
) -> Float[Array, "B f h w C"]:
    """Noise of `count` videos; that of video i depends on the seed and i alone."""
    if latents is not None:
        if tuple(latents.shape) != (count, *shape):
            raise Refusal(
                f"expected latents of shape {(count, *shape)}; got {tuple(latents.shape)}"
            )
        if isinstance(latents, jax.Array):
            return latents.astype(jnp.float32)
        return jax.device_put(np.asarray(latents, np.float32))
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise Refusal(f"seed must be an integer in 0..2^32-1; got {seed!r}")
    keys = [seeded(seed, index) for index in range(count)]
    return jnp.stack([jax.random.normal(key, shape, jnp.float32) for key in keys])
