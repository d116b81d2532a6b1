"""Training a Wan transformer and its text encoder: flow matching on a pool of latents.

`x = (1 - t) clean + t noise` and the network learns the velocity `noise - clean`. Any Wan in the
Diffusers layout: the small one that ships, or a 1.3B to fine-tune. State is float32, products run
in the recipe's dtype; block matrices go by Muon, everything else by Adam. Over several devices the
batch is split and everything else is copied.

Source: flow matching, arXiv 2210.02747; logit-normal times and their shift, arXiv 2403.03206;
Muon, https://kellerjordan.github.io/posts/muon.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray

from astraea_ports.t5 import T5Encoder
from astraea_ports.wan.latent_pool import Latents
from astraea_ports.wan.training_forward import Layout, velocity
from astraea_ports.wan.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train; two runs of one recipe, one model and one device kind give the same weights.

    Attributes:
      steps: of the whole run.
      batch: clips a step, over all devices.
      muon_rate: step size on block matrices, whose update is orthogonal.
      adam_rate: step size on everything else.
      text_rate: factor on `adam_rate` for the text encoder.
      muon_decay: weight decay of block matrices.
      clip: largest norm of all gradients together.
      average: decay of the moving average of the weights, which is what is exported.
      text_dropout: share of the clips whose caption is left empty, for guidance.
      time_width: standard deviation of the times' logits before the shift.
      time_even: share of the times drawn evenly before the shift, as a solver's grid visits them:
        the logit-normal hardly ever draws the noisiest tenth, where the layout is decided.
      shift: flow shift of the times, the model's own.
      motion_weight: how much more an error counts where a clip differs from its first frame.
      span: part of the rate's schedule that the run goes through, for a run in several sittings on
        several machines: (0, 0.5), then (0.5, 1).
      seed: of the noise, the times and the order of the clips.
      dtype: of the products.
    """

    steps: int
    batch: int = 128
    muon_rate: float = 6e-3
    adam_rate: float = 1.5e-3
    text_rate: float = 1.0
    muon_decay: float = 0.01
    clip: float = 1.0
    average: float = 0.998
    text_dropout: float = 0.1
    time_width: float = 1.1
    time_even: float = 0.25
    shift: float = 3.0
    motion_weight: float = 0.5
    span: tuple[float, float] = (0.0, 1.0)
    seed: int = 0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self):
        """Refuses numbers out of range."""
        ranges = {
            "steps": (1, 10**9),
            "batch": (1, 10**6),
            "muon_rate": (0, 1),
            "adam_rate": (0, 1),
            "text_rate": (0, 100),
            "clip": (1e-6, 1e6),
            "average": (0, 1),
            "text_dropout": (0, 1),
            "time_width": (0.01, 10),
            "time_even": (0, 1),
            "shift": (0.01, 100),
            "motion_weight": (0, 100),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} must be in {low}..{high}; got {value}")
        first, last = self.span
        if not 0 <= first < last <= 1:
            raise ValueError(f"span must rise within 0..1; got {self.span}")


class Networks(NamedTuple):
    """What is trained."""

    transformer: Transformer
    text_encoder: T5Encoder


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


def start(networks: Networks, recipe: Recipe) -> State:
    """A run's first state; the arrays of `networks` are copied."""
    networks = jax.tree.map(lambda x: jnp.array(x, jnp.float32), networks)
    copy = jax.tree.map(jnp.copy, networks)
    moments = optimiser(recipe, recipe.steps).init(cast(Any, networks))
    return State(jnp.int32(0), networks, copy, moments)


def descend[M](
    rule: optax.GradientTransformation, gradients: M, moments: Any, weights: M
) -> tuple[M, Any]:
    """One step of an optimiser: the weights after it, and its moments."""
    # optax takes any pytree, but its annotations say arrays.
    updates, moments = rule.update(cast(Any, gradients), moments, cast(Any, weights))
    return cast(M, optax.apply_updates(cast(Any, weights), updates)), moments


def rate_factor(fraction: Float[Array, ""]) -> Float[Array, ""]:
    """The schedule of the rates: up over 2 %, level to 55 %, then straight down to 2 %."""
    down = 0.02 + 0.98 * (1 - fraction) / 0.45
    return jnp.clip(jnp.minimum(fraction / 0.02, down), 0.02, 1.0)


def optimiser(recipe: Recipe, steps: int | Int[Array, ""]) -> optax.GradientTransformation:
    """Clipping, then Muon on the block matrices and Adam on the rest.

    Args:
      recipe: the step sizes, at their largest.
      steps: of the run; traced, so that a run of another length is the same program.
    """
    first, last = recipe.span
    warm_up = jnp.clip(steps // 50, 1, 200)

    def rate(base: float) -> Callable[[Any], Any]:
        def at(count):
            fraction = count / steps
            # Every run starts without moments, so every one warms up, wherever its span begins.
            warm = jnp.minimum(1.0, (count + 1) / warm_up)
            return base * warm * rate_factor(first + (last - first) * fraction)

        return at

    muon = optax.contrib.muon(
        rate(recipe.muon_rate),
        weight_decay=recipe.muon_decay,
        muon_weight_dimension_numbers=optax.contrib.MuonDimensionNumbers((1,), (2,)),
    )

    def adam(base: float) -> optax.GradientTransformation:
        return optax.adamw(rate(base), b1=0.9, b2=0.98, weight_decay=1e-4)

    by_label: dict[Hashable, optax.GradientTransformation] = {
        "matrix": _by_shape(muon),
        "text": adam(recipe.adam_rate * recipe.text_rate),
        "rest": adam(recipe.adam_rate),
    }
    return optax.chain(
        optax.clip_by_global_norm(recipe.clip), optax.partition(by_label, cast(Any, _labels))
    )


def _labels(networks: Networks) -> Networks:
    """Which optimiser a weight goes by."""
    labels = jax.tree.map(lambda _: "rest", networks.transformer)
    labels.blocks = jax.tree.map(
        # Stacked over blocks: a matrix has three axes. The modulation tables are no matrices.
        lambda leaf: "matrix" if leaf.ndim == 3 and leaf.shape[1] > 6 else "rest",
        networks.transformer.blocks,
    )
    return Networks(labels, jax.tree.map(lambda _: "text", networks.text_encoder))


def _by_shape(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs `inner` on all leaves of one shape at once: few large products, not many small ones."""

    def gather(tree):
        groups: dict[str, list[Array]] = {}
        for leaf in jax.tree.leaves(tree):
            groups.setdefault("x".join(map(str, leaf.shape[1:])), []).append(leaf)
        return {name: jnp.concatenate(leaves) for name, leaves in groups.items()}

    def scatter(groups, tree):
        leaves, tree_def = jax.tree.flatten(tree)
        taken = dict.fromkeys(groups, 0)
        out = []
        for leaf in leaves:
            name = "x".join(map(str, leaf.shape[1:]))
            out.append(groups[name][taken[name] : taken[name] + leaf.shape[0]])
            taken[name] += leaf.shape[0]
        return jax.tree.unflatten(tree_def, out)

    def update(updates, state, params=None):
        grouped, state = inner.update(gather(updates), state, gather(params))
        return scatter(grouped, updates), state

    return optax.GradientTransformation(lambda params: inner.init(gather(params)), update)


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

    chosen = split(jax.random.randint(keys[0], (recipe.batch,), 0, len(pool.ids)))
    clean = split(pool.latents[chosen].astype(jnp.float32))
    drop = split(jax.random.bernoulli(keys[1], recipe.text_dropout, (recipe.batch,)))[:, None]
    return Batch(
        clean=clean,
        noise=split(jax.random.normal(keys[2], clean.shape)),
        time=split(draw_times(keys[3], recipe)),
        ids=jnp.where(drop, empty.ids, pool.ids[chosen]),
        mask=jnp.where(drop, empty.mask, pool.mask[chosen]),
    )


def draw_times(key: PRNGKeyArray, recipe: Recipe) -> Float[Array, "B"]:
    """Noise levels in 0..1: logit-normal and, in part, even; then shifted."""
    keys = jax.random.split(key, 3)
    shape = (recipe.batch,)
    middle = jax.nn.sigmoid(recipe.time_width * jax.random.normal(keys[0], shape))
    even = jax.random.bernoulli(keys[1], recipe.time_even, shape)
    time = jnp.where(even, jax.random.uniform(keys[2], shape), middle)
    return recipe.shift * time / (1 + (recipe.shift - 1) * time)


def encode(encoder: T5Encoder, ids: Int[Array, "B L"], mask: Int[Array, "B L"]) -> Array:
    """Text embeddings, zero past the end, as the pipeline makes them."""
    out = encoder(ids, mask)
    return out * mask[..., None].astype(out.dtype)


def loss(networks: Networks, batch: Batch, recipe: Recipe, layout: Layout) -> Float[Array, ""]:
    """Mean squared error of the velocity, weighted towards what moves."""
    cast = jax.tree.map(lambda x: x.astype(recipe.dtype), networks)
    time = batch.time[:, None, None, None, None]
    noisy = (1 - time) * batch.clean + time * batch.noise
    context = encode(cast.text_encoder, batch.ids, batch.mask)
    predicted = velocity(cast.transformer, noisy, 1000 * batch.time, context, layout)
    error = jnp.square(predicted - (batch.noise - batch.clean))
    weight = 1 + recipe.motion_weight * _change(batch.clean)
    return jnp.mean(error * weight) / jnp.mean(weight)


def _change(clean: Float[Array, "B f h w C"]) -> Float[Array, "B f h w 1"]:
    """Squared change from the first frame, over its mean in the clip, 4 at most."""
    change = jnp.square(clean - clean[:, :1]).mean(-1, keepdims=True)
    mean = change.mean(axis=(1, 2, 3), keepdims=True)
    return jnp.minimum(change / (mean + 1e-4), 4.0)


@functools.partial(
    jax.jit, static_argnames=("recipe", "layout", "mesh"), donate_argnames=("state",)
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
    value, gradients = jax.value_and_grad(loss)(state.networks, batch, recipe, layout)
    finite = jnp.isfinite(optax.tree.norm(gradients))
    rule = optimiser(recipe, steps)
    networks, moments = descend(rule, gradients, state.moments, state.networks)
    # A short memory at first, so that the average forgets where it started.
    keep = jnp.minimum(recipe.average, state.step / (state.step + 20))
    average = jax.tree.map(lambda a, w: keep * a + (1 - keep) * w, state.average, networks)
    following = State(state.step + 1, networks, average, moments)
    return following, jnp.where(finite, value, jnp.nan)


def step_flops(networks: Networks, recipe: Recipe, shape: tuple[int, ...], length: int) -> float:
    """Operations of one step's products, three times those of its forward pass; no recomputation.

    Args:
      networks: what is trained.
      recipe: for the batch.
      shape: of one clip's latents, [f, h, w, C].
      length: text tokens.
    """
    config = networks.transformer.config
    tokens = int(np.prod(shape[:3])) // int(np.prod(config.patch_size))
    width, ffn = config.width, config.ffn_dim
    per_token = 6 * width**2 + 2 * width * ffn
    attention = 2 * tokens * width + 2 * length * width
    block = 2 * (tokens * (per_token + attention) + length * 2 * width**2)
    return 3.0 * recipe.batch * config.num_layers * block
