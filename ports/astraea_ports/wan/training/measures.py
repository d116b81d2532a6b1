"""How well a model predicts clips that it was not trained on, at noise that is always the same."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from astraea_ports.pipeline import tiles
from astraea_ports.training.clips import check_clips
from astraea_ports.training.recipe import Recipe
from astraea_ports.wan.pipeline import Pipeline
from astraea_ports.wan.training.forward import Layout, kept_bytes
from astraea_ports.wan.training.networks import Networks
from astraea_ports.wan.training.settings import check_model, gentle
from astraea_ports.wan.training.step import Batch, loss, num_tokens

TIMES = (0.5, 0.7, 0.85, 0.95)
"""Noise levels that a clip is predicted at: where layout, motion and colours are decided."""


class HeldOut(NamedTuple):
    """Losses on the same clips at the same noise.

    Attributes:
      before: of the model that a training started from.
      after: of the trained one.
    """

    before: float
    after: float


def held_out_loss(
    model: str | os.PathLike[str],
    clips: Float[np.ndarray | Array, "P F height width 3"],
    captions: Sequence[str],
    *,
    recipe: Recipe | None = None,
    seed: int = 0,
    revision: str | None = None,
) -> float:
    """A model's mean training loss on clips, each at the four noise levels of `TIMES`.

    Args:
      model: "tiny", a folder in the Diffusers layout, or a hub id.
      clips: in [0, 1], of a size that the model can do.
      captions: one a clip.
      recipe: for the loss: what motion counts, and the dtype of the products.
      seed: of the noise. The same seed and the same clips have the same noise, whatever the model.
      revision: of a hub id: a branch, a tag or a commit.

    Raises:
      Refusal: clips without a caption each, of a size that the model can't do, or not in [0, 1]; a
        model that is none.
    """
    check_clips(clips, captions)
    found = check_model(model, np.shape(clips)[1:], revision=revision)
    recipe = gentle(found.shift) if recipe is None else recipe
    pipeline = Pipeline.from_pretrained(model, dtype=recipe.dtype, staged=False, revision=revision)
    networks = Networks(pipeline.transformer, pipeline.text_encoder)
    tokens = pipeline.tokenizer(list(captions))
    shape = pipeline.latents_shape(*np.shape(clips)[1:4])
    each = num_tokens(pipeline.transformer.config, shape) * len(TIMES)
    layout = Layout.for_device(recipe.dtype, kept_bytes(pipeline.transformer.config, each))
    recipe = dataclasses.replace(recipe, steps=1)  # its length is no part of the program
    losses = []
    for index, clip in enumerate(clips):
        clean = tiles.encode(pipeline.vae, 2 * jnp.asarray(clip, jnp.float32)[None] - 1)
        words = [jnp.asarray(rows[index, None]) for rows in (tokens.ids, tokens.mask)]
        key = jax.random.fold_in(jax.random.key(seed), index)
        losses.append(_loss(networks, clean, *words, key, recipe=recipe, layout=layout))
    return float(np.mean(jax.device_get(losses)))


@functools.partial(jax.jit, static_argnames=("recipe", "layout"))
def _loss(
    networks: Networks,
    clean: Float[Array, "1 f h w C"],
    ids: Int[Array, "1 L"],
    mask: Int[Array, "1 L"],
    key: PRNGKeyArray,
    *,
    recipe: Recipe,
    layout: Layout,
) -> Float[Array, ""]:
    """Of one clip, at all times at once."""
    clean, ids, mask = (jnp.repeat(rows, len(TIMES), 0) for rows in (clean, ids, mask))
    noise = jax.random.normal(key, clean.shape, jnp.float32)
    batch = Batch(clean.astype(jnp.float32), noise, jnp.array(TIMES, jnp.float32), ids, mask)
    return loss(networks, batch, recipe, layout)
