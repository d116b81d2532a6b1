"""Models that are shaped like others than Wan: the interface holds for them; they ship nowhere."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from helpers import Inputs

from astraea_jax import model as core
from astraea_jax.attention import query_sparse_attention


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
        kinds = core.Kind("spatial", core.Groups(frames)), core.Kind("temporal", temporal)
        stacks = (core.Stack(self.num_layers, kinds),)
        signals = (("embedding", 1),)
        return core.Geometry(tuple(shape[1:4]), self.width, shape[4], stacks, signals)

    def prepare(self, conditions, geometry):
        return conditions.mean(axis=1), jnp.zeros(geometry.grid[0])

    def modulation(self, timestep, prepared):
        return (timestep / 1000)[:, None, None]

    def signals(self, modulation):
        return {"embedding": modulation[:, 0]}

    def embed(self, latents, prepared):
        return self.enter(latents.reshape(latents.shape[0], -1, latents.shape[-1])), ()

    def layers(self, stack, prepared):
        return self.kinds

    def bind(self, stack, layer, prepared, modulation):
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
        self.parts = (
            core.Part("self", 1 + 0.1 * modulation, self.self_attention, shares=True),
            core.Part("cross", 1.0, self.cross_attention),
            core.Part("mlp", 1.0, self.mlp),
        )

    def _part(self, x, index):
        width = x.shape[-1]
        # Normed, or the tokens grow from block to block until a last bit decides the video.
        x = x / jnp.sqrt(1 + jnp.square(x).mean(axis=-1, keepdims=True))
        return x @ self.linear.kernel[...][:, index * width : (index + 1) * width]

    def shared(self, tokens, side):
        return (self._part(tokens.values, 0), self._part(tokens.values, 1)), side

    def self_attention(self, rows, keys_values):
        (keys, values), indices = keys_values, rows.indices
        batch, num_tokens, width = keys.shape
        if indices is None:
            indices = jnp.broadcast_to(jnp.arange(num_tokens), (batch, num_tokens))
        size = num_tokens // self.frames
        # Scatter the queries among all tokens, attend within groups, and gather them back.
        at = jnp.arange(batch)[:, None]
        spread = jnp.zeros_like(keys).at[at, indices].set(self._part(rows.values, 2), mode="drop")

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

        return core.PartOut(join(out), join(lse).swapaxes(1, 2))

    def cross_attention(self, rows, shared):
        text = self.text.mean(axis=-1)[:, None, None]
        return core.PartOut(jnp.broadcast_to(text, rows.values.shape))

    def mlp(self, rows, shared):
        return core.PartOut(jnp.tanh(self._part(rows.values, 3)))


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


class Moments(NamedTuple):
    """Modulation of `TwoStackModel`: of each token, for frames may have times of their own."""

    tokens: jax.Array
    whole: jax.Array


class TwoStackModel(nnx.Module):
    """Two stacks of unlike blocks, and all else that Wan has not.

    Blocks of the first attend to all tokens and the text, and move the text on as HunyuanVideo's
    do; those of the second attend within a frame, and have attention and MLP in one part. Its
    conditions are a text with a mask, and a frame rate; the first frame's tokens are modulated as
    if they were clean, as those of an image are.
    """

    def __init__(self, width: int, channels: int, rngs: nnx.Rngs):
        self.width, self.cache_dtype = width, jnp.dtype(jnp.float32)
        self.enter = nnx.Linear(channels, width, rngs=rngs)
        self.text = nnx.Linear(8, width, rngs=rngs)
        keys = jax.random.split(rngs.params(), 5)
        make = lambda key: nnx.Linear(width, 5 * width, rngs=nnx.Rngs(key))  # noqa: E731
        self.double, self.single = jax.vmap(make)(keys[:2]), jax.vmap(make)(keys[2:])
        self.leave = nnx.Linear(width, channels, rngs=rngs)

    def geometry(self, shape):
        frames = shape[1]
        double = core.Kind("double", core.Groups(), ("self", "mlp"))
        single = core.Kind("single", core.Groups(frames), ("fused",))
        stacks = core.Stack(2, (double,)), core.Stack(3, (single,))
        signals = ("embedding", 1), ("projected", frames * shape[2] * shape[3])
        return core.Geometry(tuple(shape[1:4]), self.width, shape[4], stacks, signals)

    def prepare(self, conditions, geometry):
        first = np.arange(geometry.num_tokens) < geometry.num_tokens // geometry.grid[0]
        text = self.text(conditions["text"]) * (conditions["fps"] / 24)[:, None, None]
        return text, conditions["mask"], jnp.asarray(first), jnp.zeros(geometry.grid[0])

    def modulation(self, timestep, prepared):
        time = (timestep / 1000)[:, None, None]
        return Moments(jnp.where(prepared[2][None, :, None], 0.0, time), time)

    def signals(self, modulation):
        return {"embedding": modulation.whole[:, 0], "projected": modulation.tokens[..., 0]}

    def embed(self, latents, prepared):
        return self.enter(latents.reshape(latents.shape[0], -1, latents.shape[-1])), prepared[0]

    def layers(self, stack, prepared):
        return self.single if stack else self.double

    def bind(self, stack, layer, prepared, modulation):
        _, mask, _, frames = prepared
        kind = SingleBlock if stack else DoubleBlock
        return (kind(layer, mask, modulation, len(frames)),)

    def head(self, tokens, modulation):
        return self.leave(tokens) * (1 + 0.1 * modulation.tokens)

    def unpatchify(self, patches, geometry):
        return patches.reshape(patches.shape[0], *geometry.grid, -1)


def attend(queries, keys, values, mask):
    """Attention of one head with a mask over keys, and its log-sum-exp."""
    logits = jnp.einsum("bkc,bnc->bkn", queries, keys) * queries.shape[-1] ** -0.5
    logits = jnp.where(mask[:, None], logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1)
    return jnp.einsum("bkn,bnc->bkc", jnp.exp(logits - lse[..., None]), values), lse


class _StackedBlock:
    entry = None

    def __init__(self, linear, mask, modulation, frames):
        self.linear, self.mask, self.frames = linear, mask, frames
        self.moments = modulation

    def _project(self, x, index):
        width = x.shape[-1]
        x = x / jnp.sqrt(1 + jnp.square(x).mean(axis=-1, keepdims=True))
        return x @ self.linear.kernel[...][:, index * width : (index + 1) * width]

    def _over_text(self, tokens, text):
        """Keys and values of tokens and text, and the mask of both."""
        keys, values = (
            jnp.concatenate([self._project(tokens, index), self._project(text, index)], axis=1)
            for index in (0, 1)
        )
        everywhere = jnp.ones(tokens.shape[:2], bool)
        return keys, values, jnp.concatenate([everywhere, self.mask], axis=1)

    def _moved(self, text, shared):
        attended, _ = attend(self._project(text, 2), *shared)
        return text + jnp.tanh(attended) + 0.5 * jnp.tanh(self._project(text, 3))


class DoubleBlock(_StackedBlock):
    """A bound block of the first stack."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        scale = jnp.repeat(self.moments.tokens, self.linear.kernel.shape[0], axis=-1)
        self.entry = core.EntryNorm(0.1 * scale, 0.2 * scale, 1e-6, jnp.dtype(jnp.float32))
        self.parts = (
            core.Part("self", 1 + 0.1 * self.moments.tokens, self.self_attention, shares=True),
            core.Part("mlp", 1.0, self.mlp),
        )

    def shared(self, tokens, side):
        shared = self._over_text(self.entry(tokens), side)
        return shared, self._moved(side, shared)

    def self_attention(self, rows, shared):
        out, lse = attend(self._project(self.entry(rows), 2), *shared)
        return core.PartOut(out, lse[:, None])

    def mlp(self, rows, shared):
        shift = rows.of(self.moments.tokens)
        return core.PartOut(jnp.tanh(self._project(rows.values, 4) + shift))


class SingleBlock(_StackedBlock):
    """A bound block of the second stack."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        gate = 1 - 0.1 * self.moments.tokens
        self.parts = (core.Part("fused", gate, self.fused, shares=True),)

    def shared(self, tokens, side):
        batch, num_tokens, width = tokens.values.shape
        by_frame = tokens.values.reshape(batch * self.frames, num_tokens // self.frames, width)
        text = jnp.repeat(side, self.frames, axis=0)
        frame = _StackedBlock(
            self.linear, jnp.repeat(self.mask, self.frames, axis=0), self.moments, self.frames
        )
        alone = self._over_text(tokens.values[:, :0], side)
        return frame._over_text(by_frame, text), self._moved(side, alone)

    def fused(self, rows, shared):
        values, indices = rows.values, rows.indices
        batch, width = len(values), values.shape[-1]
        num_tokens = self.moments.tokens.shape[1]
        if indices is None:
            indices = jnp.broadcast_to(jnp.arange(num_tokens), (batch, num_tokens))
        # Queries are put among all tokens, attend within their frames, and are gathered back.
        at = jnp.arange(batch)[:, None]
        spread = jnp.zeros((batch, num_tokens, width)).at[at, indices]
        spread = spread.set(self._project(values, 2), mode="drop")
        out, lse = attend(spread.reshape(batch * self.frames, -1, width), *shared)
        out, lse = (
            x.reshape(batch, num_tokens, -1).at[at, indices].get(mode="clip") for x in (out, lse)
        )
        out = out + jnp.tanh(self._project(values, 3))
        return core.PartOut(out, lse.swapaxes(1, 2))


def two_stack_inputs(videos: int = 1) -> tuple[TwoStackModel, Inputs]:
    """The model of two stacks with 4 frames of 20 tokens."""
    keys = jax.random.split(jax.random.key(5))
    latents = jax.random.normal(keys[0], (videos, 4, 4, 5, 3))
    text = jax.random.normal(keys[1], (2 * videos, 6, 8))
    mask = jnp.arange(6)[None] < jnp.arange(3, 3 + 2 * videos)[:, None]
    conditions = {"text": text, "mask": mask, "fps": jnp.full((2 * videos,), 16.0)}
    return TwoStackModel(16, 3, nnx.Rngs(2)), Inputs(latents, conditions)
