"""The stages of a run: what they report, how a part is had for one, and the last of them.

A part that is shapes alone is loaded for its stage, timed apart, and let go when the stage ends.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from astraea_jax import denoise as loop
from astraea_jax.checks import Refusal
from astraea_jax.methods import Method, Trace
from astraea_jax.methods.base import seeded
from astraea_jax.model import VideoDiT
from astraea_jax.schedule import Schedule
from astraea_jax.timing import Stopwatch, stopwatch, timed_jit
from astraea_ports.checkpoints import Loadable
from astraea_ports.pipeline import tiles
from astraea_ports.pipeline.plan import Plan
from astraea_ports.pipeline.tiles import VAE

Stage = Literal["text", "load", "denoise", "decode"]

Progress = Callable[[Stage, int, int], None]
"""Called as progress(stage, done, total)."""


@dataclasses.dataclass(frozen=True)
class Result:
    """Videos and how they came to be.

    Attributes:
      video: in [0, 1], float32.
      latents: denoised, normalised.
      branches: guidance branches that were run, 1 or 2.
      schedule: the levels that were run.
      trace: which tokens each step computed, or () when it was not asked for.
      seconds: of each stage, compilation apart; "load" is that of transformer and VAE, where they
        are loaded for their stage. What several runs share ("text", "load") stands with the first.
    """

    video: Float[Array, "B F height width 3"]
    latents: Float[Array, "B f h w 16"]
    branches: int
    schedule: Schedule
    trace: Trace | tuple[()]
    seconds: Mapping[Stage, Stopwatch]


class Made(NamedTuple):
    """A run that is not decoded yet.

    Attributes:
      method: how its steps were computed.
      schedule: the levels that were run.
      latents: denoised, normalised.
      branches: guidance branches that were run, 1 or 2.
      trace: which tokens each step computed, or () when it was not asked for.
      seconds: of each stage until now.
    """

    method: Method
    schedule: Schedule
    latents: Float[Array, "B f h w 16"]
    branches: int
    trace: Trace | tuple[()]
    seconds: dict[Stage, Stopwatch]


def quiet(stage: Stage, done: int, total: int) -> None:
    """No progress is asked for."""


def resident(
    module: Any,
    loadable: Loadable | None,
    report: Progress = quiet,
    seconds: dict[Stage, Stopwatch] | None = None,
) -> Any:
    """A part with its weights: as it is, or loaded now.

    Args:
      module: the part; of shapes alone where it is loaded for its stage.
      loadable: the way to get it then.
      report: takes progress.
      seconds: gets those of loading.

    Raises:
      Refusal: shapes alone, and no way to load them.
    """
    if not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(module)):
        return module
    if loadable is None:
        raise Refusal(
            f"expected {type(module).__name__} with weights, or with a loader among the "
            "pipeline's loaders; got shapes alone"
        )
    report("load", 0, 1)
    with stopwatch() as watch:
        module = jax.block_until_ready(loadable.load())
    total = ({} if seconds is None else seconds).setdefault("load", Stopwatch())
    total.run += watch.run
    total.compile += watch.compile
    report("load", 1, 1)
    return module


def check_finite(stage: str, values: Any, advice: str) -> None:
    """Refuses what a stage gave for each video if there is NaN or infinity in it.

    Args:
      stage: what gave it.
      values: its result, a video a row.
      advice: what the message proposes to check.
    """
    wrong = [
        index for index, row in enumerate(jax.device_get(values)) if not np.isfinite(row).all()
    ]
    if wrong:
        which = ", ".join(str(index + 1) for index in wrong[:10])
        raise Refusal(
            f"{stage} gave NaN or infinity in {len(wrong)} of {len(values)} videos ({which}): "
            f"check {advice}"
        )


def denoise(
    transformer: VideoDiT,
    plan: Plan,
    context: Float[Array, "rows M D"],
    *,
    driver: loop.Driver,
    trace: bool,
    report: Progress,
    seconds: dict[Stage, Stopwatch],
) -> Made:
    """Runs a plan's method and schedule.

    Args:
      transformer: with its weights.
      plan: what to run.
      context: text of each guidance branch, of each prompt.
      driver: see `astraea_jax.denoise`.
      trace: whether to keep which tokens were computed.
      report: takes progress.
      seconds: gets those of denoising.

    Raises:
      Refusal: NaN or infinity in the latents.
    """
    steps = plan.solver.steps
    report("denoise", 0, steps)
    with stopwatch() as seconds["denoise"]:
        denoised = jax.block_until_ready(
            loop.denoise(
                transformer,
                plan.noise,
                context,
                solver=plan.solver,
                schedule=plan.schedule,
                method=plan.method,
                guidance=plan.guidance,
                key=seeded(plan.seed),
                driver=driver,
                progress=lambda done: report("denoise", done, steps),
                trace=trace,
            )
        )
    check_finite(
        "denoising", denoised.latents, "the transformer's weights, LoRA, dtype and guidance"
    )
    return Made(
        plan.method,
        plan.schedule,
        denoised.latents,
        1 if plan.guidance is None else 2,
        denoised.trace,
        seconds,
    )


@timed_jit()
def _decode(model: VAE, latents):
    return (model.decode(latents) + 1) / 2


def decode(
    model: VAE, latents: Float[Array, "B f h w 16"], report: Progress = quiet
) -> Float[Array, "B F height width 3"]:
    """Latents to videos in [0, 1], one video at a time, in pieces where it is large."""
    frames, rows, columns = latents.shape[1:4]
    cut = tiles.pieces(model.config, (frames, rows, columns))
    report("decode", 0, len(latents))
    videos = []
    for index in range(len(latents)):
        one = jax.lax.slice_in_dim(latents, index, index + 1)
        if cut is None:
            video = _decode(model, one)
        else:
            whole = tiles.decode(model, one, tile=cut[0], frames=cut[1])
            video = jax.device_put((whole + 1) / 2)
        check_finite("decoding", video, "the VAE's weights")
        videos.append(jax.block_until_ready(video))
        report("decode", index + 1, len(latents))
    return jnp.concatenate(videos)
