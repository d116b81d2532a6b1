"""What a pipeline is asked for, checked before any long work."""

import operator
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from astraea_jax import checks, solvers
from astraea_jax.checks import Number, Refusal, shown
from astraea_jax.methods import Dense, Method
from astraea_jax.methods.base import check as check_method
from astraea_jax.methods.base import seeded
from astraea_jax.schedule import Schedule
from astraea_ports.pipeline.tiles import Sizes
from astraea_ports.text.tokenizer import Tokenizer

LARGEST_GUIDANCE = 1000

NAMED = 10
"""Unknown words that a warning names."""

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


class Options(TypedDict, total=False):
    """What a call may say beside its prompts; left out, or None, is the model's default.

    Attributes:
      frames: of each video; of Wan 4k + 1.
      height: pixels; of Wan a multiple of 16.
      width: likewise.
      steps: denoising steps; a schedule's length where one is given.
      guidance: scale of classifier-free guidance, 0..1000; 1 or less runs no second branch.
      negative_prompt: what the unconditional branch reads; empty as in Diffusers, or None.
      seed: of the noise, 0 unless told; video i draws from (seed, i), whatever else is in the
        batch. Of a seed for each, video i draws as if made alone; a method that draws uses the
        first.
      latents: noise [P, f, h, w, C] to start from instead.
      method: how steps are computed; the plain model where it is left out.
      schedule: a level for each step; dense where it is left out.
      solver: "unipc" unless told, "dpm++" or "euler"; like the seed, never None.
      shift: flow shift, above 0 and at most 1000.
      grid: "diffusers" or "original" noise levels; left out, the model's layout's.
    """

    frames: int | None
    height: int | None
    width: int | None
    steps: int | None
    guidance: float | None
    negative_prompt: str | None
    seed: int | Sequence[int]
    latents: Any
    method: Method | None
    schedule: Schedule | None
    solver: str
    shift: float | None
    grid: solvers.Grid | None


_UNLESS_SAID = {"seed": 0, "solver": "unipc"}
"""Of the options that are no model's own; None is none of their values."""


class Model(NamedTuple):
    """What a plan takes from its model.

    Attributes:
      tokenizer: reads the prompts.
      latents: the shape of one video's latents.
      steps: unless told.
      guidance: unless told.
      shift: unless told.
      grid: unless told.
    """

    tokenizer: Tokenizer
    latents: tuple[int, int, int, int]
    steps: int
    guidance: float
    shift: float
    grid: solvers.Grid


def check_options(options: Mapping[str, Any]) -> None:
    """Refuses options that no call has.

    Raises:
      TypeError: as for any function; the message names those that there are.
    """
    known = Options.__annotations__
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(f"expected options of {', '.join(known)}; got {', '.join(unknown)}")


def make(prompts: str | Sequence[str], model: Model, options: Options) -> Plan:
    """Checks a call and fills its defaults in; the video's size is the model's already.

    Raises:
      Refusal: anything out of range.
    """
    said: dict[str, Any] = dict(_UNLESS_SAID)
    said |= {
        key: value for key, value in options.items() if value is not None or key in _UNLESS_SAID
    }
    prompts = [prompts] if isinstance(prompts, str) else prompts
    check_prompts(prompts, model.tokenizer)
    seeds = check_seeds(said["seed"], len(prompts))
    guidance, shift = said.get("guidance", model.guidance), said.get("shift", model.shift)
    check_numbers(0, guidance, shift)
    schedule, steps = said.get("schedule"), said.get("steps")
    if schedule is not None and not isinstance(schedule, Schedule):
        raise Refusal(f"schedule must be a Schedule; got {shown(schedule)}")
    if steps is None:
        steps = model.steps if schedule is None else schedule.steps
    negative_prompt = _check_negative(said.get("negative_prompt", ""), guidance)
    table = solvers.make(
        said["solver"], steps, shift=float(shift), grid=said.get("grid", model.grid)
    )
    schedule = Schedule.dense(steps) if schedule is None else schedule
    method = check_method(said["method"]) if "method" in said else Dense()
    if schedule.steps != steps:
        raise Refusal(
            f"expected a schedule of {steps} levels, one a solver step; got {schedule.steps}"
        )
    return Plan(
        prompts=list(prompts),
        negative_prompt=negative_prompt if guidance > 1 else None,
        noise=make_noise(len(prompts), model.latents, seeds, said.get("latents")),
        solver=table,
        schedule=schedule,
        method=method,
        guidance=guidance if guidance > 1 else None,
        seed=seeds[0][0],
    )


def _check_negative(negative_prompt: Any, guidance: float) -> str:
    """Returns what the unconditional branch reads; warns where there is none to read it."""
    if not isinstance(negative_prompt, str):
        raise Refusal(f"negative_prompt must be text or None; got {shown(negative_prompt)}")
    if negative_prompt.strip() and guidance <= 1:
        warnings.warn(
            f"a negative prompt has no effect at guidance {guidance:g}: ask for more than 1",
            skip_file_prefixes=(OURS,),
        )
    return negative_prompt


MOST_TOKENS = 1 << 20
"""Tokens of a video: a dozen times those of 81 frames at 720x1280, two hundred times the time."""


def check_numbers(seed: Any, guidance: float | None, shift: float | None) -> None:
    """Refuses what no model can do, before one is opened; None is the model's own."""
    check_seeds(seed, 1)
    if guidance is not None:
        checks.number("guidance", guidance, 0, LARGEST_GUIDANCE)
    if shift is not None:
        checks.number("shift", shift, *solvers.SHIFTS)


def check_seeds(seed: Any, count: int) -> list[tuple[int, int]]:
    """The seed of each of `count` videos, and its place among the videos of that seed.

    With one seed the places count up; with one for each video, a video is as if made alone.

    Raises:
      Refusal: a seed out of range, or another number of them than of videos.
    """
    listed = isinstance(seed, Sequence | np.ndarray) and not isinstance(seed, str)
    if listed and len(seed) != count:
        raise Refusal(f"expected a seed, or one for each of {count} videos; got {len(seed)} seeds")
    pairs: list[tuple[Any, int]]
    pairs = [(each, 0) for each in seed] if listed else [(seed, place) for place in range(count)]
    for each, _ in pairs:
        if checks.Whole(0, 2**32 - 1).problem(each) is not None:
            raise Refusal(f"seed must be an integer in 0..2^32-1; got {shown(each)}")
    return [(int(each), place) for each, place in pairs]


def check_size(
    size: tuple[int, int, int], image: Sizes, patch: tuple[int, int, int]
) -> tuple[int, int, int]:
    """Refuses frames, height and width that a model can't do; the message says the nearest.

    Args:
      size: of a video.
      image: sizes of the VAE.
      patch: latent frames, rows and columns of a token.

    Returns:
      The three as int; NumPy's integers are taken too.
    """
    time = image.temporal_factor
    rows, columns = image.spatial_factor * patch[1], image.spatial_factor * patch[2]
    for name, value, unit in (("height", size[1], rows), ("width", size[2], columns)):
        if not _is_whole(value) or value < unit or value % unit:
            raise Refusal(
                f"{name} must be a multiple of {unit} pixels; got {shown(value)}"
                f"{_nearest(value, unit, unit)}"
            )
    # Latent frames are one and one for each `time` more; tokens take patch[0] of them.
    unit, first = time * patch[0], time * (patch[0] - 1) + 1
    if not _is_whole(size[0]) or size[0] < first or (size[0] - first) % unit:
        raise Refusal(
            f"frames must be a multiple of {unit} plus {first}; got {shown(size[0])}"
            f"{_nearest(size[0], unit, first)}"
        )
    frames, height, width = (operator.index(value) for value in size)
    tokens = ((frames - first) // unit + 1) * (height // rows) * (width // columns)
    if tokens > MOST_TOKENS:
        frames, height, width, tokens = map(shown, (frames, height, width, tokens))
        raise Refusal(
            f"{frames} frames of {height} x {width} pixels are {tokens} tokens; at most "
            f"{MOST_TOKENS} are made: ask for fewer frames or pixels"
        )
    return frames, height, width


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _nearest(value: Any, unit: int, first: int) -> str:
    """The nearest of `first`, `first + unit`, ... to a number, for a message."""
    if Number(-(1 << 40), 1 << 40).problem(value) is not None:
        return ""
    return f": the nearest is {max(first, first + unit * round((float(value) - first) / unit))}"


def check_prompts(prompts: Sequence[str], tokenizer: Tokenizer) -> None:
    """Refuses what is no list of prompts, and prompts that say nothing.

    Warns:
      UserWarning: words that the model can only spell.
    """
    if not isinstance(prompts, Sequence | np.ndarray) or isinstance(prompts, str | bytes):
        raise Refusal(f"expected a list of prompts; got {shown(prompts)}")
    if not len(prompts):
        raise Refusal("expected at least one prompt; got none")
    for prompt in prompts:
        if not isinstance(prompt, str) or not prompt.strip():
            raise Refusal(
                f"a prompt must say something; got {shown(prompt)}: describe the video to make"
            )
    unknown = list(dict.fromkeys(w for prompt in prompts for w in tokenizer.unknown_words(prompt)))
    if unknown:
        named = [word if len(word) <= checks.SHOWN else shown(word) for word in unknown[:NAMED]]
        more = f" and {len(unknown) - NAMED} more" if len(unknown) > NAMED else ""
        warnings.warn(
            f"the model does not know: {', '.join(named)}{more}; "
            "it can only spell such words, and the video may not show them",
            skip_file_prefixes=(OURS,),
        )


def make_noise(
    count: int,
    shape: tuple[int, int, int, int],
    seeds: Sequence[tuple[int, int]],
    latents: Float[Array, "B f h w C"] | None,
) -> Float[Array, "B f h w C"]:
    """Noise of `count` videos; see `check_seeds` for what each draws from."""
    if latents is not None:
        found = tuple(checks.array("latents", latents, f"of shape {(count, *shape)}").shape)
        if found != (count, *shape):
            raise Refusal(f"expected latents of shape {(count, *shape)}; got {found}")
        if not jnp.issubdtype(latents.dtype, jnp.floating):
            raise Refusal(f"expected latents of floats; got {latents.dtype}")
        if isinstance(latents, jax.Array):
            return latents.astype(jnp.float32)
        return jax.device_put(np.asarray(latents, np.float32))
    keys = [seeded(seed, place) for seed, place in seeds]
    return jnp.stack([jax.random.normal(key, shape, jnp.float32) for key in keys])
