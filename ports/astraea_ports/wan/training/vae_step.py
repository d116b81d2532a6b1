"""A step of training a Wan VAE: reconstruction, sharp edges, latents held near a unit normal.

What objects cover counts five times as much as the background, which is most of the picture. The
first four fifths of a run see crops of 17x64x64, the rest whole clips.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray

from astraea_jax.checks import Number, OneOf, Whole
from astraea_ports.training.recipe import (
    MOST_CLIPS,
    SHARE,
    SHARED_RULES,
    by_shape,
    check_fields,
    descend,
    loss_and_gradients,
    moving_average,
    rate_factor,
)
from astraea_ports.wan.vae import VAE, Decoder, Encoder
from astraea_ports.wan.vae_layers import Past

CROP_FRAMES, CROP_SIDE, WHOLE_FROM = 17, 64, 0.8


class Drawn(NamedTuple):
    """Clips in [0, 1] and how much of each pixel counts as an object."""

    video: Float[Array, "B F side side 3"]
    cover: Float[Array, "B F side side"]


Draw = Callable[[PRNGKeyArray, int], Drawn]
"""`draw(key, count)`: that many clips, a pure function that can be jitted."""


@dataclasses.dataclass(frozen=True)
class VAERecipe:
    """How to train.

    Attributes:
      steps: of the whole run.
      clips: drawn each step.
      crops: taken from each clip, at places that all clips of a step share.
      muon_rate: step size on convolutions.
      adam_rate: step size on everything else.
      clip: largest norm of all gradients together.
      average: decay of the moving average of the weights, which is what is exported.
      normal_weight: of the latents' divergence from a unit normal.
      seed: of the clips, the crops and the latents' noise.
      dtype: of the products.
    """

    steps: int
    clips: int = 16
    crops: int = 4
    muon_rate: float = 0.015
    adam_rate: float = 2e-3
    clip: float = 1.0
    average: float = 0.997
    normal_weight: float = 1e-4
    seed: int = 0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self):
        """Refuses what is out of range."""
        check_fields(
            self,
            {
                **SHARED_RULES,
                "clips": Whole(1, MOST_CLIPS),
                "crops": Whole(1, 64),
                "clip": Number(1e-6, 1e6),
                "average": SHARE,
                "normal_weight": Number(0, 100),
                "dtype": OneOf(("bfloat16", "float32")),
            },
        )


class VAEState(NamedTuple):
    """A run between two steps."""

    step: Int[Array, ""]
    vae: VAE
    average: VAE
    moments: Any


def optimiser(recipe: VAERecipe) -> optax.GradientTransformation:
    """Clipping, then Muon on the convolutions (but the one to pixels) and Adam on the rest."""

    def label(leaf: Array) -> str:
        matrix = leaf.ndim >= 2 and leaf.shape[-1] > 3 and leaf.size > 1000
        return "matrix" if matrix else "rest"

    def axes(stacks: Any) -> Any:
        return jax.tree.map(
            lambda leaf: optax.contrib.MuonDimensionNumbers(
                tuple(range(1, leaf.ndim - 1)), leaf.ndim - 1
            ),
            stacks,
        )

    def rate(base: float):
        return lambda count: base * rate_factor((count + 1) / recipe.steps)

    muon = optax.contrib.muon(
        rate(recipe.muon_rate), weight_decay=0.01, muon_weight_dimension_numbers=axes
    )
    by_label: dict[Hashable, optax.GradientTransformation] = {
        "matrix": _one_high(by_shape(muon)),
        "rest": optax.adamw(rate(recipe.adam_rate), b2=0.98, weight_decay=0.0),
    }
    return optax.chain(
        optax.clip_by_global_norm(recipe.clip),
        optax.partition(by_label, lambda vae: jax.tree.map(label, vae)),
    )


def _one_high(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Hands `inner` every leaf as a stack of one."""

    def stack(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[None], tree)

    def update(updates, state, params=None):
        changed, state = inner.update(stack(updates), state, stack(params))
        return jax.tree.map(lambda leaf: leaf[0], changed), state

    return optax.GradientTransformation(lambda params: inner.init(stack(params)), update)


def whole(part: Encoder | Decoder, clip: Array) -> Array:
    """One half of the VAE on a whole clip."""
    past = Past()
    return part.leave(part.enter(clip, past), past)


def loss(
    vae: VAE, batch: tuple[Float[Array, "B f h w C"], Drawn], recipe: VAERecipe
) -> Float[Array, ""]:
    """How far the reconstruction is from the clips, and the latents from a normal distribution.

    Args:
      vae: to reconstruct with.
      batch: noise of unit variance, to draw the latents with, and clips.
      recipe: how to train.
    """
    noise, drawn = batch
    cast = jax.tree.map(lambda x: x.astype(recipe.dtype), vae)
    pixels = 2 * drawn.video - 1
    encoded = cast.quant.pointwise(whole(cast.encoder, pixels.astype(recipe.dtype)))
    mean, log_variance = jnp.split(encoded.astype(jnp.float32), 2, axis=-1)
    log_variance = jnp.clip(log_variance, -20.0, 4.0)
    latents = mean + jnp.exp(0.5 * log_variance) * noise
    decoded = whole(cast.decoder, cast.post_quant.pointwise(latents.astype(recipe.dtype)))
    error = decoded.astype(jnp.float32) - pixels
    weight = 1 + 4 * drawn.cover[..., None]
    pixel_loss = jnp.mean((jnp.abs(error) + 2 * jnp.square(error)) * weight)
    edges = sum(jnp.mean(jnp.abs(jnp.diff(error, axis=axis))) for axis in (1, 2, 3))
    normal = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance)
    return pixel_loss + 0.5 * edges + recipe.normal_weight * normal


def latents_shape(vae: VAE, drawn: Drawn) -> tuple[int, ...]:
    """Of the latents of some clips, [B, f, h, w, C]."""
    return jax.eval_shape(raw_latents, vae, drawn.video).shape


def cut(key: PRNGKeyArray, drawn: Drawn, recipe: VAERecipe) -> Drawn:
    """Crops at random places; those of one number lie alike in all clips."""
    frames, side = drawn.cover.shape[1:3]
    length, size = min(CROP_FRAMES, frames), min(CROP_SIDE, side)
    places = jax.random.uniform(key, (recipe.crops, 3), jnp.float32)
    parts = []
    for place in places:
        # Encoders see time in fours after the first frame: a crop starts at either end.
        start = jnp.where(place[0] < 0.5, 0, frames - length)
        top, left = (jnp.int32(p * ((side - size) // 8 + 1)) * 8 for p in place[1:])
        begin = (0, start, top, left)
        parts.append(
            Drawn(
                jax.lax.dynamic_slice(
                    drawn.video, (*begin, 0), (len(drawn.video), length, size, size, 3)
                ),
                jax.lax.dynamic_slice(drawn.cover, begin, (len(drawn.cover), length, size, size)),
            )
        )
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


@functools.partial(
    jax.jit, static_argnames=("draw", "recipe", "whole", "mesh"), donate_argnames=("state",)
)
def train_step(
    state: VAEState, *, draw: Draw, recipe: VAERecipe, whole: bool, mesh: Mesh
) -> tuple[VAEState, Float[Array, ""]]:
    """One step; everything random comes from the recipe's seed and the step's number."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(recipe.seed), state.step), 3)
    over = NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))
    drawn = draw(keys[0], recipe.clips)
    drawn = drawn if whole else cut(keys[1], drawn, recipe)
    noise = jax.random.normal(keys[2], latents_shape(state.vae, drawn), jnp.float32)
    batch = jax.lax.with_sharding_constraint((noise, drawn), over)
    share = functools.partial(loss, recipe=recipe)
    value, gradients = loss_and_gradients(share, state.vae, batch, mesh)
    finite = jnp.isfinite(optax.tree.norm(gradients))
    weights, moments = descend(optimiser(recipe), gradients, state.moments, state.vae)
    average = moving_average(state.average, weights, state.step, recipe.average, warm=5)
    copied = NamedSharding(mesh, PartitionSpec())  # or the compiler may split what it likes
    following = jax.lax.with_sharding_constraint(
        VAEState(state.step + 1, weights, average, moments), copied
    )
    return following, jnp.where(finite, value, jnp.nan)


@jax.jit
def raw_latents(vae: VAE, pixels: Float[Array, "B F height width 3"]) -> Float[Array, "B f h w C"]:
    """Means of the latents of clips in [-1, 1], before they are normalised."""
    encoded = vae.quant.pointwise(whole(vae.encoder, pixels))
    return encoded[..., : vae.config.latent_channels]
