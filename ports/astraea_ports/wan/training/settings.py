"""What a fine-tuning is made of where nothing else is said, and what its model can take."""

import math
import os
from typing import NamedTuple

import jax
from flax import nnx

from astraea_jax import checks, report
from astraea_jax.checks import Refusal
from astraea_ports import checkpoints
from astraea_ports.pipeline import plan as plans
from astraea_ports.text import t5
from astraea_ports.training.pool import memory_bytes
from astraea_ports.training.recipe import Recipe
from astraea_ports.wan import contents
from astraea_ports.wan.config import TransformerConfig
from astraea_ports.wan.training.networks import Networks
from astraea_ports.wan.training.step import first_state
from astraea_ports.wan.training.transformer import PoolPlan
from astraea_ports.wan.transformer import Transformer
from astraea_ports.wan.vae import VAEConfig

STEPS = 200
"""Of a run whose length is not said."""

_BLOCK, _STREAMED = 4, 64
"""Clips for each device: encoded at once, and pooled of a stream."""


class Found(NamedTuple):
    """What a model's JSON files say that a training has to know.

    Attributes:
      shift: the model's flow shift.
      transformer: its sizes.
      text_encoder: its sizes.
    """

    shift: float
    transformer: TransformerConfig
    text_encoder: t5.T5Config


def check_model(
    model: str | os.PathLike[str], clip: tuple[int, ...], *, revision: str | None = None
) -> Found:
    """Holds a model's JSON files against the clips; no weight is fetched or read.

    Args:
      model: "tiny", a folder, or a hub id.
      clip: shape of one: frames, height, width, 3.
      revision: of a hub id: a branch, a tag or a commit.

    Raises:
      Refusal: no such model, one in the original layout, or a clip of a size that it can't do.
    """
    folder = checkpoints.find_model(model, revision=revision).path
    found = contents.read(folder)
    if contents.is_original(folder):
        raise Refusal(
            f"expected a model in the Diffusers layout; {folder} has the original one, in which "
            "nothing trained is written: start from the model's repository for Diffusers"
        )
    transformer = TransformerConfig.from_dict(checkpoints.read_config(folder / "transformer"))
    encoder = t5.T5Config.from_dict(checkpoints.read_config(folder / "text_encoder"))
    image = VAEConfig.from_dict(checkpoints.read_config(folder / "vae"))
    frames, height, width, _ = clip
    try:
        plans.check_size((frames, height, width), image, transformer.patch_size)
    except Refusal as error:
        raise Refusal(f"the clips are of a size that the model can't do: {error}") from error
    return Found(found.shift, transformer, encoder)


def check_memory(found: Found) -> None:
    """Refuses a training whose state and gradients alone are more than a device holds."""

    def made() -> Networks:
        rngs = nnx.Rngs(0)
        return Networks(
            Transformer(found.transformer, rngs), t5.T5Encoder(found.text_encoder, rngs)
        )

    networks = jax.eval_shape(made)
    state = jax.eval_shape(lambda: first_state(made(), Recipe(steps=1)))
    leaves = [*jax.tree.leaves(state), *jax.tree.leaves(networks)]
    needed = sum(4 * math.prod(leaf.shape) for leaf in leaves)
    held = memory_bytes()
    if held is not None and needed > held:
        raise Refusal(
            f"training this model takes {report.human_bytes(needed)} for weights (the text "
            "encoder's too), their average, moments and gradients in float32, and a device has "
            f"{report.human_bytes(held)}: take a smaller model or a larger device"
        )


def gentle(
    shift: float,
    *,
    steps: int | None = None,
    batch: int | None = None,
    rate: float | None = None,
    seed: int | None = None,
) -> Recipe:
    """A recipe that teaches something new and keeps what the model knows.

    Step sizes are a twelfth of those that the small model was trained with for the block matrices,
    two thirds for the rest; products are in bfloat16, on a CPU in float32.

    Args:
      shift: of the times, the model's own.
      steps: of the whole run; 200 when left out.
      batch: clips a step; two for each device when left out.
      rate: factor on the step sizes, above 0 and at most 100.
      seed: of the noise, the times and the order of the clips.

    Raises:
      Refusal: any of these out of range.
    """
    rate = 1.0 if rate is None else checks.number("rate", rate, 0, 100, above=True)
    return Recipe(
        steps=STEPS if steps is None else steps,
        batch=2 * jax.device_count() if batch is None else batch,
        muon_rate=5e-4 * rate,
        adam_rate=1e-3 * rate,
        average=0.99,
        shift=shift,
        seed=0 if seed is None else seed,
        dtype="float32" if jax.default_backend() == "cpu" else "bfloat16",
    )


def plan_for(clips: int | None) -> PoolPlan:
    """A pool that holds each of some clips equally often, or the clips of a stream as they come.

    Args:
      clips: how many there are; None of a stream.
    """
    devices = jax.device_count()
    if clips is None:
        return PoolPlan(size=_STREAMED * devices, block=_BLOCK * devices, refresh_every=8)
    size = math.lcm(clips, devices)
    share = size // devices
    block = next(each for each in range(_BLOCK, 0, -1) if share % each == 0)
    return PoolPlan(size=size, block=block * devices, refresh_every=0)
