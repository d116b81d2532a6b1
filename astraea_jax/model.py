"""What a video diffusion transformer offers, so that every method runs on it unchanged.

A model is a pytree of parameters. It is laid out as stacks of layers; a stack's layers all look
alike and are scanned, and a layer holds one block or several kinds of block in a fixed order (Wan:
one stack of one kind; OpenSora: one of a spatial and a temporal kind; HunyuanVideo: two stacks). A
block offers its sub-layers apart, un-gated, so that a method may compute, reuse or skip each of
them, for all tokens or for some. Tokens that are not the video's (text that the blocks change) go
along beside: every method moves them on in full.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Conditions = Any
"""What a video is made of beside noise, as the model defines it: a pytree whose leaves have a
leading axis over rows. Text embeddings [B, M, D] for Wan; text with its mask, frame rate and size;
image features and latents; pooled text."""

Prepared = Any
"""What a model computes once a run: text keys and values of every block, rotary tables."""

LayerInputs = Any
"""A pytree with a leading axis over a stack's layers: parameters and prepared text of each."""

Modulation = Any
"""What a step adds: the time embedding and what follows from it for every block."""

Side = Any
"""Tokens beside the video's that the blocks move on; () where a model has none."""

Shared = Any
"""What a block's parts read of all tokens: keys and values, normed and rotated."""


class Groups(NamedTuple):
    """How a kind of block splits the tokens into groups that attend within themselves.

    Attributes:
      number: groups of N / number tokens each; 1 means that all attend to all.
      contiguous: True when a group's tokens are adjacent (a frame), False when they lie
        `number` apart (a position followed through the frames).
    """

    number: int = 1
    contiguous: bool = True


class Kind(NamedTuple):
    """A kind of block.

    Attributes:
      name: "block" where there is one kind; "spatial", "temporal", "double", ... where more.
      groups: which tokens attend to which.
      parts: names of its sub-layers, in order: "self", "cross", "mlp", or "fused".
    """

    name: str = "block"
    groups: Groups = Groups()
    parts: tuple[str, ...] = ("self", "cross", "mlp")


class Stack(NamedTuple):
    """Layers that all look alike.

    Attributes:
      layers: how many.
      kinds: of the blocks in each, in order of computation.
    """

    layers: int
    kinds: tuple[Kind, ...]


class Geometry(NamedTuple):
    """Static sizes of a run.

    Attributes:
      grid: tokens along (frames, height, width).
      width: channels of a token, H.
      patch_values: numbers that the head gives for a token.
      stacks: of layers, in order of computation.
      signals: names and widths of what `VideoDiT.signals` gives.
    """

    grid: tuple[int, int, int]
    width: int
    patch_values: int
    stacks: tuple[Stack, ...]
    signals: tuple[tuple[str, int], ...] = ()

    @property
    def num_blocks(self) -> int:
        """Blocks that each keep a cache, L."""
        return sum(stack.layers * len(stack.kinds) for stack in self.stacks)

    @property
    def num_layers(self) -> int:
        """Layers of all stacks."""
        return sum(stack.layers for stack in self.stacks)

    @property
    def num_tokens(self) -> int:
        """Tokens of one video, N."""
        frames, height, width = self.grid
        return frames * height * width

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Of all stacks, in order of computation."""
        return tuple(kind for stack in self.stacks for kind in stack.kinds)


class Rows(NamedTuple):
    """Some tokens of the sequence, or all of it.

    Attributes:
      values: the tokens.
      indices: their positions; None means that `values` is the whole sequence. Positions past the
        tokens are computed like the last one, and written nowhere.
      normed: what the block's `entry` makes of them, where that is known.
    """

    values: Float[Array, "B K H"]
    indices: Int[Array, "B K"] | None = None
    normed: Float[Array, "B K H"] | None = None

    def of(self, tokens: Float[Array, "B N H"]) -> Float[Array, "B K H"]:
        """Of something that every token has, the rows'; as it is where it has one for all."""
        if self.indices is None or tokens.shape[1] == 1:
            return tokens
        return jnp.take_along_axis(tokens, self.indices[..., None], axis=1, mode="clip")


class PartOut(NamedTuple):
    """What a sub-layer gives.

    Attributes:
      out: un-gated.
      lse: log-sum-exp of its attention; None where it has none over the video's tokens.
      entropy: gives the entropy of each row's attention to the text, mean over the heads, in nats;
        None where there is no such attention. A function, since few ask and it costs a softmax.
    """

    out: Float[Array, "B K H"]
    lse: Float[Array, "B A K"] | None = None
    entropy: Callable[[], Float[Array, "B K"]] | None = None


class Part(NamedTuple):
    """A sub-layer of a bound block.

    Attributes:
      name: "self", "cross", "mlp" or "fused".
      gate: factor on what it gives: [B, 1, H], one for each token [B, N, H], or a number.
      run: the sub-layer, un-gated, on rows, given what `Block.shared` made.
      shares: whether it reads that.
    """

    name: str
    gate: Array | float
    run: Callable[[Rows, Shared], PartOut]
    shares: bool = False


class EntryNorm(NamedTuple):
    """What a block makes of the tokens that its attention reads, as data.

    A layer norm without parameters, a scale and a shift, in float32.

    Attributes:
      scale: added to one; for all tokens, or for each.
      shift: added last.
      eps: of the norm.
      dtype: of the result.
    """

    scale: Float[Array, "B #N H"]
    shift: Float[Array, "B #N H"]
    eps: float
    dtype: jnp.dtype

    def __call__(self, rows: Rows) -> Float[Array, "B K H"]:
        """Normed, scaled and shifted rows; those that are known as they are."""
        if rows.normed is not None:
            return rows.normed
        normed = layer_norm(rows.values, self.eps) * (1 + rows.of(self.scale))
        return (normed + rows.of(self.shift)).astype(self.dtype)


@runtime_checkable
class Block(Protocol):
    """One block with its parameters, its conditions and this step's modulation bound to it."""

    @property
    def entry(self) -> EntryNorm | None:
        """What `shared` begins with, if it is of this kind; None if not."""
        ...

    @property
    def parts(self) -> tuple[Part, ...]:
        """Its sub-layers, in order; each reads the rows that the ones before it left."""
        ...

    def shared(self, tokens: Rows, side: Side) -> tuple[Shared, Side]:
        """What the parts read of the whole sequence, and the side tokens moved on.

        `tokens.normed` is given where it is known, never to a block that has no `entry`.
        """
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

    def prepare(self, conditions: Conditions, geometry: Geometry) -> Prepared:
        """What stays the same through a run; Refusal for conditions that are not its own."""
        ...

    def modulation(self, timestep: Float[Array, "B"], prepared: Prepared) -> Modulation:
        """What a step adds; timestep in 0..1000."""
        ...

    def signals(self, modulation: Modulation) -> Mapping[str, Float[Array, "B D"]]:
        """What of it tells how far the model's answer moves between steps, by name.

        "embedding": of the time; "projected": what the blocks get of it, flat.
        """
        ...

    def embed(
        self, latents: Float[Array, "B F Y X C"], prepared: Prepared
    ) -> tuple[Float[Array, "B N H"], Side]:
        """Tokens of the latents, row-major in (frame, height, width), and what goes beside."""
        ...

    def layers(self, stack: int, prepared: Prepared) -> LayerInputs:
        """What a scan over the layers of a stack runs over."""
        ...

    def bind(
        self, stack: int, layer: LayerInputs, prepared: Prepared, modulation: Modulation
    ) -> tuple[Block, ...]:
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


class BlockOut(NamedTuple):
    """What a block gives of some rows.

    Attributes:
      rows: that leave it.
      lse: log-sum-exp of its attention; None where that was not run.
      outs: of each part by name, un-gated.
      entropy: of the attention to the text; see `PartOut`.
    """

    rows: Float[Array, "B K H"]
    lse: Float[Array, "B A K"] | None
    outs: dict[str, Float[Array, "B K H"]]
    entropy: Callable[[], Float[Array, "B K"]] | None = None


def apply_block(
    block: Block,
    rows: Rows,
    shared: Shared,
    *,
    known: Mapping[str, Float[Array, "B K H"]] | None = None,
) -> BlockOut:
    """The whole block on some rows: exact for them, given what is shared of all tokens.

    Args:
      block: a bound block.
      rows: the tokens to compute.
      shared: of `block.shared` on the whole sequence; anything where no part that runs reads it.
      known: what parts give, by name, un-gated: those are not run.
    """
    known = {} if known is None else known
    lse, entropy, outs = None, None, {}
    for part in block.parts:
        made = PartOut(known[part.name]) if part.name in known else part.run(rows, shared)
        lse = made.lse if lse is None else lse
        entropy = made.entropy if entropy is None else entropy
        gate = part.gate if isinstance(part.gate, float | int) else rows.of(part.gate)
        outs[part.name] = made.out
        rows = Rows(add_gated(rows.values, gate, made.out), rows.indices)
    return BlockOut(rows.values, lse, outs, entropy)


def dense_forward(
    model: VideoDiT,
    latents: Float[Array, "B F Y X C"],
    timestep: Float[Array, "B"],
    conditions: Conditions,
) -> Float[Array, "B F Y X C"]:
    """The plain model: velocity of latents, with no cache of any kind."""
    geometry = model.geometry(latents.shape)
    prepared = model.prepare(conditions, geometry)
    modulation = model.modulation(timestep, prepared)
    carry = model.embed(latents, prepared)
    for stack in range(len(geometry.stacks)):

        def layer_step(carry, layer, stack=stack):
            tokens, side = carry
            for block in model.bind(stack, layer, prepared, modulation):
                shared, side = block.shared(Rows(tokens), side)
                tokens = apply_block(block, Rows(tokens), shared).rows
            return (tokens, side), None

        carry, _ = jax.lax.scan(layer_step, carry, model.layers(stack, prepared))
    return model.unpatchify(model.head(carry[0], modulation), geometry)


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
