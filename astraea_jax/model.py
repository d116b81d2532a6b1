"""What a video diffusion transformer offers, so that every method runs on it unchanged.

A model is a pytree of parameters. It is laid out as layers that all look alike and are scanned;
a layer holds one block or several kinds of block in a fixed order (Wan: one; OpenSora: a spatial
and a temporal one). A block offers its sub-layers apart, un-gated, so that a method may compute,
reuse or skip each of them, for all tokens or for some.
"""

import hashlib
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Prepared = Any
"""What a model computes once a run: text keys and values of every block, rotary tables."""

LayerInputs = Any
"""A pytree with a leading axis over layers: parameters and prepared text of each layer."""

Modulation = Any
"""What a step adds: the time embedding and what follows from it for every block."""


class Geometry(NamedTuple):
    """Static sizes of a run.

    Attributes:
      grid: tokens along (frames, height, width).
      width: channels of a token, H.
      num_layers: layers that the scan runs over.
      patch_values: numbers that the head gives for a token.
      groups: of each kind of block in a layer, in order of computation.
    """

    grid: tuple[int, int, int]
    width: int
    num_layers: int
    patch_values: int
    groups: tuple["Groups", ...]

    @property
    def num_blocks(self) -> int:
        """Blocks that each keep a cache, L."""
        return self.num_layers * len(self.groups)

    @property
    def num_tokens(self) -> int:
        """Tokens of one video, N."""
        frames, height, width = self.grid
        return frames * height * width


class Groups(NamedTuple):
    """How a kind of block splits the tokens into groups that attend within themselves.

    Attributes:
      number: groups of N / number tokens each; 1 means that all attend to all.
      contiguous: True when a group's tokens are adjacent (a frame), False when they lie
        `number` apart (a position followed through the frames).
    """

    number: int = 1
    contiguous: bool = True


class Gates(NamedTuple):
    """Factors on the sub-layers' outputs; 1.0 where a model has none."""

    self_attention: Array | float
    cross_attention: Array | float
    mlp: Array | float


class EntryNorm(NamedTuple):
    """What a block makes of the tokens that its self-attention reads, as data.

    A layer norm without parameters, a scale and a shift, in float32.

    Attributes:
      scale: added to one.
      shift: added last.
      eps: of the norm.
      dtype: of the result.
    """

    scale: Float[Array, "B 1 H"]
    shift: Float[Array, "B 1 H"]
    eps: float
    dtype: jnp.dtype

    def __call__(self, rows: Float[Array, "B K H"]) -> Float[Array, "B K H"]:
        """Normed, scaled and shifted rows."""
        normed = layer_norm(rows, self.eps) * (1 + self.scale) + self.shift
        return normed.astype(self.dtype)


@runtime_checkable
class Block(Protocol):
    """One block with its parameters, its text and this step's modulation bound to it.

    Attributes:
      gates: on the sub-layers.
      entry: what `keys_values` begins with, if it is of this kind; None if not.
    """

    gates: Gates
    entry: EntryNorm | None

    def keys_values(
        self, tokens: Float[Array, "B N H"], normed: Float[Array, "B N H"] | None = None
    ) -> Any:
        """Keys and values of every token, normed and rotated.

        `normed` is what `entry` makes of the tokens, where that is known; never given to a block
        that has no `entry`.
        """
        ...

    def self_attention(
        self,
        rows: Float[Array, "B K H"],
        indices: Int[Array, "B K"] | None,
        keys_values: Any,
        normed: Float[Array, "B K H"] | None = None,
    ) -> tuple[Float[Array, "B K H"], Float[Array, "B A K"]]:
        """Un-gated self-attention of rows (at `indices`; None means all tokens), and its LSE.

        `normed` is what `entry` makes of the rows, as it is for `keys_values`.
        """
        ...

    def cross_attention(self, rows: Float[Array, "B K H"]) -> Float[Array, "B K H"]:
        """Un-gated attention of rows to the text."""
        ...

    def mlp(self, rows: Float[Array, "B K H"]) -> Float[Array, "B K H"]:
        """Un-gated feed-forward of rows."""
        ...


@runtime_checkable
class VideoDiT(Protocol):
    """A video diffusion transformer."""

    @property
    def cache_dtype(self) -> jnp.dtype:
        """Dtype of what is kept of the tokens from step to step; may be narrower than theirs."""
        ...

    def geometry(self, latents_shape: tuple[int, ...]) -> Geometry:
        """Static sizes for latents [B, F, H, W, C]; Refusal for sizes it can't do."""
        ...

    def prepare(self, context: Float[Array, "B M D"], geometry: Geometry) -> Prepared:
        """What stays the same through a run."""
        ...

    def modulation(self, timestep: Float[Array, "B"]) -> Modulation:
        """What a step adds; timestep in 0..1000."""
        ...

    def embed(self, latents: Float[Array, "B F Y X C"]) -> Float[Array, "B N H"]:
        """Tokens of the latents, row-major in (frame, height, width)."""
        ...

    def layers(self, prepared: Prepared) -> LayerInputs:
        """What a scan over layers runs over."""
        ...

    def bind(self, layer: LayerInputs, prepared: Prepared, modulation: Modulation) -> tuple:
        """The blocks of one layer (a slice of `layers`), in order of computation."""
        ...

    def head(self, tokens: Float[Array, "B N H"], modulation: Modulation) -> Float[Array, "B N P"]:
        """Velocity of each token's patch, float32."""
        ...

    def unpatchify(
        self, patches: Float[Array, "B N P"], geometry: Geometry
    ) -> Float[Array, "B F Y X C"]:
        """Latents' layout of what the head gave."""
        ...


def layer_norm(x: Float[Array, "*rows H"], eps: float) -> Float[Array, "*rows H"]:
    """Layer norm without parameters, in float32 (and returned so)."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    return y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)


def add_gated(
    rows: Float[Array, "B K H"], gate: Array | float, out: Float[Array, "B K H"]
) -> Float[Array, "B K H"]:
    """Rows + gate * out, summed in float32 and rounded once to the dtype of `rows`."""
    total = rows.astype(jnp.float32) + gate * out.astype(jnp.float32)
    return total.astype(rows.dtype)


def apply_block(
    block: Block,
    rows: Float[Array, "B K H"],
    indices: Int[Array, "B K"] | None,
    keys_values: Any,
    normed: Float[Array, "B K H"] | None = None,
) -> tuple[Float[Array, "B K H"], Float[Array, "B A K"]]:
    """The whole block on some rows: exact for them, given the keys and values of all tokens.

    Args:
      block: a bound block.
      rows: the tokens to compute.
      indices: their positions in the sequence; None means that `rows` is all of it.
      keys_values: of `block.keys_values` on the whole sequence.
      normed: what `block.entry` makes of the rows, where that is known.

    Returns:
      The rows that leave the block, and their log-sum-exp.
    """
    known = () if normed is None else (normed,)
    attended, lse = block.self_attention(rows, indices, keys_values, *known)
    rows = add_gated(rows, block.gates.self_attention, attended)
    rows = add_gated(rows, block.gates.cross_attention, block.cross_attention(rows))
    rows = add_gated(rows, block.gates.mlp, block.mlp(rows))
    return rows, lse


def dense_forward(
    model: VideoDiT,
    latents: Float[Array, "B F Y X C"],
    timestep: Float[Array, "B"],
    context: Float[Array, "B M D"],
) -> Float[Array, "B F Y X C"]:
    """The plain model: velocity of latents, with no cache of any kind."""
    geometry = model.geometry(latents.shape)
    prepared = model.prepare(context, geometry)
    modulation = model.modulation(timestep)

    def layer_step(tokens, layer):
        for block in model.bind(layer, prepared, modulation):
            tokens, _ = apply_block(block, tokens, None, block.keys_values(tokens))
        return tokens, None

    tokens, _ = jax.lax.scan(layer_step, model.embed(latents), model.layers(prepared))
    return model.unpatchify(model.head(tokens, modulation), geometry)


def fingerprint(model: VideoDiT) -> str:
    """A short text that tells models apart: a hash of the parameters' names, shapes and samples.

    Samples are rounded to bfloat16, so that a model has one fingerprint in whatever dtype it was
    loaded.
    """
    digest = hashlib.sha256()
    leaves, _ = jax.tree.flatten_with_path(model)
    for path, leaf in leaves:
        flat = jnp.ravel(leaf)
        samples = flat[:: max(1, flat.size // 64)][:64].astype(jnp.bfloat16)
        digest.update(f"{jax.tree_util.keystr(path)} {jnp.shape(leaf)}".encode())
        digest.update(np.asarray(samples).tobytes())
    return digest.hexdigest()[:16]
