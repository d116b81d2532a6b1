"""Training the reader of `score.py` on rendered clips, some of them passed through the VAE.

Half of the clips have two objects. Contrast, tint and grain are disturbed, so that what is not
quite as rendered is read all the same.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from astraea_jax.checks import Whole
from astraea_ports.pipeline.tiles import VAE
from astraea_ports.tiny import scenes, score
from astraea_ports.tiny.scenes import Scene
from astraea_ports.tiny.score import Reader
from astraea_ports.training.recipe import (
    MOST_CLIPS,
    SHARED_RULES,
    check_fields,
    descend,
    rate_factor,
)


@dataclasses.dataclass(frozen=True)
class ReaderRecipe:
    """How to train.

    Attributes:
      steps: of the whole run.
      batch: clips a step.
      muon_rate: step size on kernels.
      adam_rate: step size on the last layer.
      vae_every: every so many steps the clips go through the VAE first; 0 for never.
      seed: of the clips.
    """

    steps: int
    batch: int = 128
    muon_rate: float = 0.02
    adam_rate: float = 2e-3
    vae_every: int = 6
    seed: int = 77

    def __post_init__(self):
        """Refuses what is out of range."""
        # A run's pace is taken of whole rounds of `vae_every` steps.
        rules = {"batch": Whole(1, MOST_CLIPS), "vae_every": Whole(0, 1000)}
        check_fields(self, {**SHARED_RULES, **rules})


class ReaderState(NamedTuple):
    """A run between two steps."""

    step: Int[Array, ""]
    reader: Reader
    moments: Any


def loss(model: Reader, frames: Float[Array, "B 9 128 128 3"], truth: Scene) -> Float[Array, ""]:
    """Cross-entropy summed over the heads; an object that is not there counts for nothing."""
    logits = model(frames)
    total = _entropy(logits["count"], truth.count - 1).mean()
    there = jnp.arange(2, dtype=jnp.int32) < truth.count[:, None]
    for name in score.OBJECT_ATTRIBUTES:
        entropy = _entropy(logits[name], getattr(truth, name))
        total += jnp.where(there, entropy, 0).sum() / there.sum()
    for name in ("ground", "texture"):
        total += _entropy(logits[name], getattr(truth, name)).mean()
    return total


def _entropy(logits: Array, labels: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def disturb(
    key: PRNGKeyArray, frames: Float[Array, "B 9 128 128 3"]
) -> Float[Array, "B 9 128 128 3"]:
    """Another contrast and tint for each clip, and grain of 4x4 pixels."""
    keys = jax.random.split(key, 4)
    batch, looks, height, width, _ = frames.shape
    gain = 1 + 0.1 * jax.random.normal(keys[0], (batch, 1, 1, 1, 1), jnp.float32)
    tint = 0.03 * jax.random.normal(keys[1], (batch, 1, 1, 1, 3), jnp.float32)
    amount = 0.03 * jax.random.uniform(keys[2], (batch, 1, 1, 1, 1), jnp.float32)
    grain = jax.random.normal(keys[3], (batch, looks, height // 4, width // 4, 1), jnp.float32)
    return frames * gain + tint + amount * grain.repeat(4, 2).repeat(4, 3)


def optimiser(recipe: ReaderRecipe) -> optax.GradientTransformation:
    """Muon on the kernels, Adam on the last layer."""

    def rate(base: float):
        return lambda count: base * rate_factor((count + 1) / recipe.steps)

    def axes(params: Any) -> Any:
        return jax.tree.map(
            lambda leaf: (
                optax.contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)
                if leaf.ndim > 1 and leaf.shape[-1] != score.NUM_LOGITS
                else None
            ),
            params,
        )

    return optax.contrib.muon(
        rate(recipe.muon_rate),
        adam_learning_rate=rate(recipe.adam_rate),
        muon_weight_dimension_numbers=axes,
    )


@functools.partial(jax.jit, static_argnames=("recipe", "through"), donate_argnames=("state",))
def train_step(
    state: ReaderState, vae: VAE, *, recipe: ReaderRecipe, through: bool
) -> tuple[ReaderState, Float[Array, ""]]:
    """One step; everything random comes from the recipe's seed and the step's number."""
    key = jax.random.fold_in(jax.random.key(recipe.seed), state.step)
    # The VAE takes most of such a step: a quarter of the clips will do.
    clips = max(1, recipe.batch // 4) if through else recipe.batch
    keys = jax.random.split(jax.random.fold_in(key, 0), clips)
    frames, truth = _draw(keys, vae, through)
    frames = disturb(jax.random.fold_in(key, 1), frames)
    value, gradients = jax.value_and_grad(loss)(state.reader, frames, truth)
    reader, moments = descend(optimiser(recipe), gradients, state.moments, state.reader)
    return ReaderState(state.step + 1, reader, moments), value


def _draw(keys, vae: VAE, through: bool) -> tuple[Float[Array, "B 9 128 128 3"], Scene]:
    """What the reader looks at of a clip for each key."""
    # Time runs 0..1 over any number of frames: nine are the nine of 33 that the reader looks at.
    frames = scenes.FRAMES if through else score.NUM_LOOKS
    clips = scenes.make_clips(keys, two=0.5, frames=frames)
    if not through:
        return clips.video, clips.scene
    return through_vae(vae, clips.video, at_once=8)[:, score.looks(frames)], clips.scene


def through_vae(
    vae: VAE, video: Float[Array, "B F height width 3"], *, at_once: int = 1
) -> Float[Array, "B F height width 3"]:
    """Videos in [0, 1] as latents and back, a few at a time: memory is that of the pixels."""

    def one(clip: Array) -> Array:
        return (vae.decode(vae.encode(2 * clip[None] - 1))[0] + 1) / 2

    return jax.lax.map(one, video, batch_size=at_once)


class ReaderTraining:
    """A `training.run.Trainee`; what it exports is one file, `score.safetensors`."""

    def __init__(self, vae: VAE, recipe: ReaderRecipe):
        """A reader from nothing; the VAE computes in the dtype of its weights."""
        self.recipe, self.batch = recipe, recipe.batch
        self.period = max(1, recipe.vae_every)
        self._vae, self._done = vae, 0

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.recipe.steps

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that decides the result."""
        return {"part": "reader", "recipe": dataclasses.asdict(self.recipe)}

    def upkeep(self) -> float:
        """Seconds a step that renewing the data takes: none, each step draws its own."""
        return 0.0

    def start(self) -> ReaderState:
        """The first state."""
        reader = Reader(nnx.Rngs(self.recipe.seed))
        return ReaderState(jnp.int32(0), reader, optimiser(self.recipe).init(cast(Any, reader)))

    def prepare(self, step: int, say: Callable[[str], None]) -> None:
        """Clips are drawn within the step; only its number matters."""
        self._done = step

    def advance(self, state: ReaderState) -> tuple[ReaderState, jax.Array]:
        """One step, on clips as drawn or through the VAE."""
        every = self.recipe.vae_every
        through = bool(every) and self._done % every == every - 1
        return train_step(state, self._vae, recipe=self.recipe, through=through)

    def export(self, state: ReaderState, folder: pathlib.Path) -> None:
        """The weights, in bfloat16."""
        score.save_reader(state.reader, folder / score.WEIGHTS.name)

    def sheet(self, state: ReaderState) -> None:
        """Nothing to draw."""
