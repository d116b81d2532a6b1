"""What several test files build on: a small random Wan, a grouped model, a masked oracle."""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from astraea_jax import model as core
from astraea_jax.attention import query_sparse_attention
from astraea_ports.wan.transformer import Transformer, TransformerConfig

FIXTURES = Path(__file__).parent / "fixtures"
LAYOUTS = ("diffusers", "original")


def slow_but(fast, values, *, core=()):
    """Parameters of a test, by name: those that are not among `fast` are slow."""
    return [
        pytest.param(
            value,
            id=str(value),
            marks=[pytest.mark.slow] * (value not in fast) + [pytest.mark.core] * (value in core),
        )
        for value in values
    ]


def full_size(part: str, layout: str, blocks: int = 1) -> dict[str, list[int]]:
    """Keys and shapes of a real checkpoint; those listed for block 0 are there for each block."""
    listed = json.loads((FIXTURES / "wan/keys_and_shapes.json").read_text())[part]
    keys = {}
    for original, (diffusers, shape) in listed.items():
        name = original if layout == "original" else diffusers
        for index in range(blocks):
            keys[name.replace(".0.", f".{index}.", 1) if "block" in name else name] = shape
    return keys


SMALL = TransformerConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=8,
    freq_dim=16,
    ffn_dim=48,
    num_layers=2,
)


@functools.cache
def small_model() -> Transformer:
    """Two blocks of width 24 with random weights."""
    with jax.ensure_compile_time_eval():  # a test may ask for it first within a program
        return Transformer(SMALL, nnx.Rngs(0))


class Inputs(NamedTuple):
    """Noise and text for `denoise`: two guidance branches of `videos` videos."""

    latents: jax.Array
    context: jax.Array


def small_inputs(seed: int = 0, *, videos: int = 1, grid=(3, 4, 5)) -> Inputs:
    """Latents whose tokens (3 x 4 x 5 = 60) tenths divide, and a text of 5 rows."""
    frames, height, width = grid
    keys = jax.random.split(jax.random.key(seed))
    latents = jax.random.normal(keys[0], (videos, frames, 2 * height, 2 * width, 4))
    return Inputs(latents, jax.random.normal(keys[1], (2 * videos, 5, 8)))


class GroupedModel(nnx.Module):
    """A model shaped like OpenSora: layers of a spatial block, then a temporal one.

    The spatial block attends within a frame and has equally many rows of each; the temporal one
    attends along a position, for any rows: it computes all queries' attention by scattering them.
    It shows that the interface holds for more than Wan; it ships nowhere.
    """

    positions = False
    """Whether the temporal block says that it, too, wants equally many rows of each position."""

    def __init__(self, width: int, layers: int, channels: int, rngs: nnx.Rngs):
        self.width, self.num_layers, self.channels = width, layers, channels
        self.cache_dtype = jnp.dtype(jnp.float32)
        self.enter = nnx.Linear(channels, width, rngs=rngs)
        keys = jax.random.split(rngs.params(), (layers, 2))
        make = lambda key: nnx.Linear(width, 4 * width, rngs=nnx.Rngs(key))  # noqa: E731
        self.kinds = jax.vmap(jax.vmap(make))(keys)
        self.leave = nnx.Linear(width, channels, rngs=rngs)

    def geometry(self, shape):
        frames, height, width = shape[1:4]
        temporal = (
            core.Groups(height * width, contiguous=False) if self.positions else core.Groups()
        )
        groups = (core.Groups(frames, contiguous=True), temporal)
        return core.Geometry(tuple(shape[1:4]), self.width, self.num_layers, shape[4], groups)

    def prepare(self, context, geometry):
        return context.mean(axis=1), jnp.zeros(geometry.grid[0])

    def modulation(self, timestep):
        return (timestep / 1000)[:, None, None]

    def embed(self, latents):
        return self.enter(latents.reshape(latents.shape[0], -1, latents.shape[-1]))

    def layers(self, prepared):
        return self.kinds

    def bind(self, layer, prepared, modulation):
        text, frames = prepared
        pick = lambda index: jax.tree.map(lambda leaf: leaf[index], layer)  # noqa: E731
        return tuple(
            GroupedBlock(pick(kind), text, modulation, len(frames), kind == 0) for kind in (0, 1)
        )

    def head(self, tokens, modulation):
        return self.leave(tokens) * (1 + 0.1 * modulation)

    def unpatchify(self, patches, geometry):
        return patches.reshape(patches.shape[0], *geometry.grid, -1)


class TwiceGroupedModel(GroupedModel):
    """The same, and its temporal block has equally many rows of each position."""

    positions = True


class GroupedBlock:
    """A bound block of `GroupedModel`."""

    entry = None

    def __init__(self, linear, text, modulation, frames, spatial):
        self.linear, self.text, self.frames, self.spatial = linear, text, frames, spatial
        self.gates = core.Gates(1 + 0.1 * modulation, 1.0, 1.0)

    def _part(self, x, index):
        width = x.shape[-1]
        # Normed, or the tokens grow from block to block until a last bit decides the video.
        x = x / jnp.sqrt(1 + jnp.square(x).mean(axis=-1, keepdims=True))
        return x @ self.linear.kernel[...][:, index * width : (index + 1) * width]

    def keys_values(self, tokens):
        return self._part(tokens, 0), self._part(tokens, 1)

    def self_attention(self, rows, indices, keys_values):
        keys, values = keys_values
        batch, num_tokens, width = keys.shape
        if indices is None:
            indices = jnp.broadcast_to(jnp.arange(num_tokens), (batch, num_tokens))
        size = num_tokens // self.frames
        # Scatter the queries among all tokens, attend within groups, and gather them back.
        at = jnp.arange(batch)[:, None]
        spread = jnp.zeros_like(keys).at[at, indices].set(self._part(rows, 2), mode="drop")

        def split(x):
            x = x.reshape(batch, self.frames, size, width)
            x = x if self.spatial else x.swapaxes(1, 2)
            return x.reshape(-1, x.shape[2], 1, width)

        out, lse = query_sparse_attention(split(spread), split(keys), split(values))
        shape = (batch, self.frames, size) if self.spatial else (batch, size, self.frames)

        def join(x):
            x = x.reshape(*shape, -1)
            x = x if self.spatial else x.swapaxes(1, 2)
            return x.reshape(batch, num_tokens, -1).at[at, indices].get(mode="clip")

        return join(out), join(lse).swapaxes(1, 2)

    def cross_attention(self, rows):
        return jnp.broadcast_to(self.text.mean(axis=-1)[:, None, None], rows.shape)

    def mlp(self, rows):
        return jnp.tanh(self._part(rows, 3))


def grouped_inputs(videos: int = 1) -> tuple[GroupedModel, Inputs]:
    """A grouped model with 6 frames of 20 tokens."""
    keys = jax.random.split(jax.random.key(3))
    latents = jax.random.normal(keys[0], (videos, 6, 4, 5, 3))
    context = jax.random.normal(keys[1], (2 * videos, 4, 8))
    return GroupedModel(16, 2, 3, nnx.Rngs(1)), Inputs(latents, context)


def twice_grouped_inputs() -> tuple[TwiceGroupedModel, Inputs]:
    """A model whose kinds need a selection each: 4 frames of 13 tokens, no tenth of either."""
    keys = jax.random.split(jax.random.key(3))
    latents = jax.random.normal(keys[0], (1, 4, 1, 13, 3))
    context = jax.random.normal(keys[1], (2, 4, 8))
    return TwiceGroupedModel(16, 2, 3, nnx.Rngs(1)), Inputs(latents, context)


def random_levels(rng: np.random.Generator, steps: int) -> tuple[int, ...]:
    """A schedule's levels: dense first, then any of a few, so that few programs are compiled."""
    return (10, *(int(level) for level in rng.choice([0, 3, 8, 10], steps - 1)))
