"""Training a Wan transformer and its text encoder: flow matching on a pool of latents.

`x = (1 - t) clean + t noise` and the network learns the velocity `noise - clean`. Any Wan in the
Diffusers layout: the small one that ships, or a 1.3B to fine-tune. State is float32, products run
in the recipe's dtype; block matrices go by Muon, everything else by Adam. Over several devices the
batch is split and everything else is copied.

Source: flow matching, arXiv 2210.02747; logit-normal times and their shift, arXiv 2403.03206;
Muon, https://kellerjordan.github.io/posts/muon.
"""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from astraea_ports.text.t5 import T5Encoder
from astraea_ports.training.pool import Latents
from astraea_ports.training.recipe import (
    Recipe,
    descend,
    loss_and_gradients,
    moving_average,
    optimiser,
)
from astraea_ports.wan.config import TransformerConfig
from astraea_ports.wan.training.forward import Layout, velocity
from astraea_ports.wan.training.networks import Networks, labels


class State(NamedTuple):
    """A run between two steps; all that a checkpoint holds.

    Attributes:
      step: steps done.
      networks: weights, float32.
      average: their moving average, float32.
      moments: of the optimisers, float32.
    """

    step: Int[Array, ""]
    networks: Networks
    average: Networks
    moments: Any


def first_state(networks: Networks, recipe: Recipe) -> State:
    """A run's first state; the arrays of `networks` are copied."""
    networks = jax.tree.map(lambda x: jnp.array(x, jnp.float32), networks)
    copy = jax.tree.map(jnp.copy, networks)
    moments = optimiser(recipe, recipe.steps, labels).init(cast(Any, networks))
    return State(jnp.int32(0), networks, copy, moments)


class Batch(NamedTuple):
    """What a step sees: clean latents, noise, times in 0..1, and the text."""

    clean: Float[Array, "B f h w C"]
    noise: Float[Array, "B f h w C"]
    time: Float[Array, " B"]
    ids: Int[Array, "B L"]
    mask: Int[Array, "B L"]


class EmptyText(NamedTuple):
    """Token ids and mask of the empty caption."""

    ids: Int[Array, "L"]
    mask: Int[Array, "L"]


def draw_batch(
    key: PRNGKeyArray, pool: Latents, empty: EmptyText, recipe: Recipe, mesh: jax.sharding.Mesh
) -> Batch:
    """Draws a step's clips, noise and times; along the batch they lie on the mesh's devices."""
    keys = jax.random.split(key, 6)
    over = NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))

    def split(x: Array) -> Array:
        return jax.lax.with_sharding_constraint(x, over)

    chosen = split(jax.random.randint(keys[0], (recipe.batch,), 0, len(pool.ids), jnp.int32))
    clean = split(pool.latents[chosen].astype(jnp.float32))
    drop = split(_some(keys[1], recipe.text_dropout, (recipe.batch,)))[:, None]
    wrong = split(_some(keys[4], recipe.wrong_text, (recipe.batch,)))
    other = split(jax.random.randint(keys[5], (recipe.batch,), 0, len(pool.ids), jnp.int32))
    told = jnp.where(wrong, other, chosen)
    return Batch(
        clean=clean,
        noise=split(jax.random.normal(keys[2], clean.shape, jnp.float32)),
        time=split(draw_times(keys[3], recipe)),
        ids=jnp.where(drop, empty.ids, pool.ids[told]),
        mask=jnp.where(drop, empty.mask, pool.mask[told]),
    )


def _some(key: PRNGKeyArray, share: float, shape: tuple[int, ...]) -> Bool[Array, "*S"]:
    """True for a share of the places, on average."""
    return jax.random.bernoulli(key, jnp.float32(share), shape)


def draw_times(key: PRNGKeyArray, recipe: Recipe) -> Float[Array, "B"]:
    """Noise levels in 0..1: logit-normal and, in part, even; then shifted."""
    keys = jax.random.split(key, 3)
    shape = (recipe.batch,)
    middle = jax.nn.sigmoid(recipe.time_width * jax.random.normal(keys[0], shape, jnp.float32))
    even = _some(keys[1], recipe.time_even, shape)
    time = jnp.where(even, jax.random.uniform(keys[2], shape, jnp.float32), middle)
    return recipe.shift * time / (1 + (recipe.shift - 1) * time)


def encode(encoder: T5Encoder, ids: Int[Array, "B L"], mask: Int[Array, "B L"]) -> Array:
    """Text embeddings, zero past the end, as the pipeline makes them."""
    out = encoder(ids, mask)
    return out * mask[..., None].astype(out.dtype)


def loss(
    networks: Networks, batch: Batch, recipe: Recipe, layout: Layout, axis: str | None = None
) -> Float[Array, ""]:
    """Mean squared error of the velocity, weighted towards what moves.

    Args:
      networks: to predict with.
      batch: the clips, or a device's share of them.
      recipe: how to train.
      layout: how the step is compiled.
      axis: of the devices whose shares, by the mean of their losses, make the batch's loss.
    """
    cast = jax.tree.map(lambda x: x.astype(recipe.dtype), networks)
    time = batch.time[:, None, None, None, None]
    noisy = (1 - time) * batch.clean + time * batch.noise
    context = encode(cast.text_encoder, batch.ids, batch.mask)
    predicted = velocity(cast.transformer, noisy, 1000 * batch.time, context, layout)
    error = jnp.square(predicted - (batch.noise - batch.clean))
    weight = 1 + recipe.motion_weight * _change(batch.clean)
    mean = jnp.mean(weight)
    return jnp.mean(error * weight) / (mean if axis is None else jax.lax.pmean(mean, axis))


def _change(clean: Float[Array, "B f h w C"]) -> Float[Array, "B f h w 1"]:
    """Squared change from the first frame, over its mean in the clip, 4 at most."""
    change = jnp.square(clean - clean[:, :1]).mean(-1, keepdims=True)
    mean = change.mean(axis=(1, 2, 3), keepdims=True)
    return jnp.minimum(change / (mean + 1e-4), 4.0)


@functools.partial(
    jax.jit,
    static_argnames=("recipe", "layout", "mesh"),
    donate_argnames=("state",),
    # Where tokens are rounded to bfloat16, XLA would keep the float32 ones beside them.
    compiler_options={"xla_allow_excess_precision": False},
)
def train_step(
    state: State,
    pool: Latents,
    empty: EmptyText,
    steps: int | Int[Array, ""],
    *,
    recipe: Recipe,
    layout: Layout,
    mesh: jax.sharding.Mesh,
) -> tuple[State, Float[Array, ""]]:
    """One step; everything random comes from the recipe's seed and the step's number.

    Args:
      state: taken apart for its memory.
      pool: to draw the clips from.
      empty: the caption where the text is left out.
      steps: of the run, instead of the recipe's.
      recipe: how to train.
      layout: how the step is compiled.
      mesh: one axis of devices, which share the batch.

    Returns:
      The next state, and the loss: NaN also where a gradient was not finite.
    """
    key = jax.random.fold_in(jax.random.key(recipe.seed), state.step)
    batch = draw_batch(key, pool, empty, recipe, mesh)
    (axis,) = mesh.axis_names
    share = functools.partial(loss, recipe=recipe, layout=layout, axis=axis)
    value, gradients = loss_and_gradients(share, state.networks, batch, mesh)
    finite = jnp.isfinite(optax.tree.norm(gradients))
    rule = optimiser(recipe, steps, labels)
    networks, moments = descend(rule, gradients, state.moments, state.networks)
    average = moving_average(state.average, networks, state.step, recipe.average, warm=20)
    following = State(state.step + 1, networks, average, moments)
    copied = NamedSharding(mesh, PartitionSpec())  # or the compiler may split what it likes
    following = jax.lax.with_sharding_constraint(following, copied)
    return following, jnp.where(finite, value, jnp.nan)


def num_tokens(config: TransformerConfig, shape: tuple[int, ...]) -> int:
    """Tokens of a clip whose latents are [f, h, w, C]."""
    return int(np.prod(shape[:3])) // int(np.prod(config.patch_size))


def step_flops(networks: Networks, recipe: Recipe, shape: tuple[int, ...], length: int) -> float:
    """Operations of one step's products, three times those of its forward pass; no recomputation.

    Args:
      networks: what is trained.
      recipe: for the batch.
      shape: of one clip's latents, [f, h, w, C].
      length: text tokens.
    """
    config = networks.transformer.config
    tokens = num_tokens(config, shape)
    width, ffn = config.width, config.ffn_dim
    per_token = 6 * width**2 + 2 * width * ffn
    attention = 2 * tokens * width + 2 * length * width
    block = 2 * (tokens * (per_token + attention) + length * 2 * width**2)
    return 3.0 * recipe.batch * config.num_layers * block
