"""The Wan 2.1 text-to-video transformer: flax modules that hold only parameters.

Source: Wan-Video/Wan2.1 wan/modules/model.py; Diffusers transformer_wan (key names).
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from astraea_jax import model as core
from astraea_jax.attention import query_sparse_attention
from astraea_ports.wan.config import TransformerConfig as TransformerConfig

Precision = Literal["reference", "fast"]
"""What weights of bfloat16 leave in float32.

"reference": the tokens between sub-layers (the residual stream), time embedding, modulation, norms
and head, as the original's autocast does. "fast": the same but for the tokens, which are rounded
to the weights' dtype after each sub-layer, as in Diffusers; half the traffic. What is kept from
step to step has the weights' dtype under either.
"""

WIDE = ("time_1", "time_2", "time_proj", "scale_shift_table", "norm", "proj_out")
"""Parameters that stay float32 under either policy: 1 % of the model, by parts of their paths."""


class RMSNorm(nnx.Module):
    """Root-mean-square norm over all channels, statistics in float32."""

    def __init__(self, width: int, eps: float):
        self.weight = nnx.Param(jnp.ones((width,)))
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows H"]) -> Float[Array, "*rows H"]:
        """Normed rows in the dtype of `x`."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.weight[...]).astype(x.dtype)


def layer_norm(x: Float[Array, "*rows H"], eps: float) -> Float[Array, "*rows H"]:
    """Layer norm without parameters, in float32 (and returned so)."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    return y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)


class Attention(nnx.Module):
    """Projections of one attention; q and k are normed over all channels before the head split."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        width = config.width
        self.to_q, self.to_k, self.to_v, self.to_out = (
            nnx.Linear(width, width, rngs=rngs) for _ in range(4)
        )
        self.norm_q = RMSNorm(width, config.eps)
        self.norm_k = RMSNorm(width, config.eps)
        self.heads = config.num_attention_heads

    def split(self, x: Float[Array, "B K H"]) -> Float[Array, "B K A C"]:
        """Channels to (head, channel of the head)."""
        return x.reshape(*x.shape[:-1], self.heads, -1)


class Rope(NamedTuple):
    """Rotary tables, float32 [N, C / 2] (or [B, K, C / 2] once gathered)."""

    cos: Array
    sin: Array


def rope_tables(grid: tuple[int, int, int], head_width: int) -> Rope:
    """Rotary angles of every token of `grid`, row-major; each axis has its own channels.

    Source: Wan 2.1 rope_params: of head width d, height and width take 2 * (d // 6) each, time
    the rest; frequencies restart per axis; computed in float64.
    """
    side = 2 * (head_width // 6)
    axes = (head_width - 2 * side, side, side)
    angles = []
    for axis, (length, channels) in enumerate(zip(grid, axes, strict=True)):
        frequency = 10000.0 ** (-np.arange(0, channels, 2) / channels)
        table = np.arange(length)[:, None] * frequency
        shape = [1, 1, 1, table.shape[-1]]
        shape[axis] = length
        angles.append(np.broadcast_to(table.reshape(shape), (*grid, table.shape[-1])))
    angle = np.concatenate(angles, axis=-1).reshape(-1, head_width // 2)
    return Rope(jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32))


def rotate(x: Float[Array, "B K A C"], rope: Rope) -> Float[Array, "B K A C"]:
    """Rotates adjacent channels (2i, 2i + 1), in float32, back to the dtype of `x`."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    cos, sin = rope.cos[..., :, None, :, None], rope.sin[..., :, None, :, None]
    # A reversal and no stack: on a GPU two halves would be written by turns, at half the speed.
    turned = pairs * cos + pairs[..., ::-1] * (sin * np.array([-1, 1], np.float32))
    return turned.reshape(x.shape).astype(x.dtype)


class Block(nnx.Module):
    """Parameters of one transformer block."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        width = config.width
        self.attn1 = Attention(config, rngs)
        self.attn2 = Attention(config, rngs)
        self.norm2 = nnx.LayerNorm(width, epsilon=config.eps, use_fast_variance=False, rngs=rngs)
        self.ffn_in = nnx.Linear(width, config.ffn_dim, rngs=rngs)
        self.ffn_out = nnx.Linear(config.ffn_dim, width, rngs=rngs)
        table = jax.random.normal(rngs.params(), (6, width)) / width**0.5
        self.scale_shift_table = nnx.Param(table)
        self.eps = config.eps


class KeysValues(NamedTuple):
    """Keys and values of every token, or of the text, [B, N, A, C]."""

    keys: Array
    values: Array


class Prepared(NamedTuple):
    """What stays the same through a run."""

    text: KeysValues  # of every block: a leading axis L
    rope: Rope


class TimeModulation(NamedTuple):
    """A step's time embedding [B, H] (for the head) and its projection [B, 6, H] (for blocks)."""

    embedding: Array
    projected: Array


class BoundBlock:
    """A block with its text, rotary tables and this step's modulation; see core.Block."""

    def __init__(self, block: Block, text: KeysValues, rope: Rope, modulation: Array):
        self.block, self.text, self.rope = block, text, rope
        self.dtype = block.ffn_in.kernel.dtype  # of the products; rows may be wider
        # Held as a value of its own: fused into the rows' loops it is added again for every row.
        total = jax.lax.optimization_barrier(
            block.scale_shift_table[...].astype(jnp.float32) + modulation
        )
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (
            total[:, index, None] for index in range(6)
        )
        self.attention_shift, self.attention_scale = shift, scale
        self.mlp_shift, self.mlp_scale = mlp_shift, mlp_scale
        self.gates = core.Gates(gate, 1.0, mlp_gate)

    def keys_values(self, tokens: Float[Array, "B N H"]) -> KeysValues:
        """Normed, rotated keys and plain values of every token."""
        attention = self.block.attn1
        x = self._modulated(tokens)
        keys = attention.split(attention.norm_k(attention.to_k(x)))
        return KeysValues(rotate(keys, self.rope), attention.split(attention.to_v(x)))

    def self_attention(
        self,
        rows: Float[Array, "B K H"],
        indices: Int[Array, "B K"] | None,
        keys_values: KeysValues,
    ) -> tuple[Float[Array, "B K H"], Float[Array, "B A K"]]:
        """Rows attend to every token; queries turn by their own position in the video."""
        attention = self.block.attn1
        rope = self.rope
        if indices is not None:
            rope = Rope(*(table.at[indices].get(mode="clip") for table in rope))
        queries = attention.split(attention.norm_q(attention.to_q(self._modulated(rows))))
        out, lse = query_sparse_attention(rotate(queries, rope), *keys_values)
        return attention.to_out(out.reshape(rows.shape)), lse

    def cross_attention(self, rows: Float[Array, "B K H"]) -> Float[Array, "B K H"]:
        """Rows attend to the text, padding included, as the model was trained."""
        attention, norm = self.block.attn2, self.block.norm2
        x = norm(rows.astype(jnp.float32))
        queries = attention.split(attention.norm_q(attention.to_q(x.astype(self.dtype))))
        out, _ = query_sparse_attention(queries, *self.text)
        return attention.to_out(out.reshape(rows.shape))

    def mlp(self, rows: Float[Array, "B K H"]) -> Float[Array, "B K H"]:
        """Feed-forward with the tanh GELU."""
        x = layer_norm(rows, self.block.eps) * (1 + self.mlp_scale) + self.mlp_shift
        hidden = self.block.ffn_in(x.astype(self.dtype))
        return self.block.ffn_out(jax.nn.gelu(hidden, approximate=True))

    def _modulated(self, x: Float[Array, "B K H"]) -> Float[Array, "B K H"]:
        """What the self-attention reads: normed, scaled and shifted by the step."""
        y = layer_norm(x, self.block.eps) * (1 + self.attention_scale) + self.attention_shift
        return y.astype(self.dtype)


class Transformer(nnx.Module):
    """Wan 2.1: patches of a noised video latent and a text in, velocity out; a core.VideoDiT."""

    def __init__(
        self, config: TransformerConfig, rngs: nnx.Rngs, *, precision: Precision = "reference"
    ):
        width, patch = config.width, int(np.prod(config.patch_size))
        self.config, self.precision = config, precision
        exact = jax.lax.Precision.HIGHEST  # a GPU's default rounds float32 products to 10 bits
        self.patch_embedding = nnx.Linear(patch * config.in_channels, width, rngs=rngs)
        self.text_1 = nnx.Linear(config.text_dim, width, rngs=rngs)
        self.text_2 = nnx.Linear(width, width, rngs=rngs)
        self.time_1 = nnx.Linear(config.freq_dim, width, precision=exact, rngs=rngs)
        self.time_2 = nnx.Linear(width, width, precision=exact, rngs=rngs)
        self.time_proj = nnx.Linear(width, 6 * width, precision=exact, rngs=rngs)
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.blocks = jax.vmap(lambda key: Block(config, nnx.Rngs(key)))(keys)
        num_out = patch * config.out_channels
        self.proj_out = nnx.Linear(width, num_out, precision=exact, rngs=rngs)
        table = jax.random.normal(rngs.params(), (2, width)) / width**0.5
        self.scale_shift_table = nnx.Param(table)

    def __call__(
        self,
        latents: Float[Array, "B F Y X C"],
        timestep: Float[Array, "B"],
        context: Float[Array, "B M D"],
    ) -> Float[Array, "B F Y X C"]:
        """Velocity of latents at a timestep in 0..1000, given the text padded to its length."""
        return core.dense_forward(self, latents, timestep, context)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the tokens between sub-layers."""
        return jnp.dtype(jnp.float32) if self.precision == "reference" else self.cache_dtype

    @property
    def cache_dtype(self) -> jnp.dtype:
        """Dtype of what is kept of the tokens from step to step: that of the large products."""
        return self.patch_embedding.kernel.dtype

    def geometry(self, latents_shape: tuple[int, ...]) -> core.Geometry:
        """Token grid for latents [B, F, H, W, C].

        Raises:
          ValueError: not five axes, other channels, or sizes that patches do not divide.
        """
        config = self.config
        if len(latents_shape) != 5 or latents_shape[-1] != config.in_channels:
            raise ValueError(
                f"expected latents [B,F,H,W,{config.in_channels}]; got {tuple(latents_shape)}"
            )
        grid = []
        for size, patch in zip(latents_shape[1:4], config.patch_size, strict=True):
            if size % patch or not size:
                raise ValueError(
                    f"expected latent frames, height and width in multiples of "
                    f"{config.patch_size}; got {tuple(latents_shape[1:4])}"
                )
            grid.append(size // patch)
        if max(grid) > config.rope_max_seq_len:
            raise ValueError(f"expected at most {config.rope_max_seq_len} an axis; got {grid}")
        patch_values = int(np.prod(config.patch_size)) * config.out_channels
        frames, height, width = grid
        return core.Geometry(
            grid=(frames, height, width),
            width=config.width,
            num_layers=config.num_layers,
            patch_values=patch_values,
            groups=(core.Groups(),),
        )

    def prepare(self, context: Float[Array, "B M D"], geometry: core.Geometry) -> Prepared:
        """Text keys and values of every block, and the rotary tables: once a run."""
        context = context.astype(self.text_1.kernel.dtype)
        text = self.text_2(jax.nn.gelu(self.text_1(context), approximate=True))

        def project(block: Block) -> KeysValues:
            attention = block.attn2
            keys = attention.split(attention.norm_k(attention.to_k(text)))
            return KeysValues(keys, attention.split(attention.to_v(text)))

        rope = rope_tables(geometry.grid, self.config.attention_head_dim)
        return Prepared(jax.vmap(project)(self.blocks), rope)

    def modulation(self, timestep: Float[Array, "B"]) -> TimeModulation:
        """Time embedding: cosines first; the projection feeds the blocks, the rest the head."""
        half = self.config.freq_dim // 2
        frequency = np.exp(-np.log(10000.0) * np.arange(half) / half).astype(np.float32)
        angle = timestep.astype(jnp.float32)[:, None] * frequency
        features = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        embedding = self.time_2(jax.nn.silu(self.time_1(features)))
        projected = self.time_proj(jax.nn.silu(embedding))
        return TimeModulation(embedding, projected.reshape(-1, 6, self.config.width))

    def embed(self, latents: Float[Array, "B F Y X C"]) -> Float[Array, "B N H"]:
        """Patches, flattened as (frame, row, column, channel), projected to tokens."""
        grid = self.geometry(latents.shape).grid
        steps = tuple(n for pair in zip(grid, self.config.patch_size, strict=True) for n in pair)
        x = latents.reshape(latents.shape[0], *steps, latents.shape[-1])
        x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(latents.shape[0], int(np.prod(grid)), -1)
        return self.patch_embedding(x.astype(self.patch_embedding.kernel.dtype)).astype(self.dtype)

    def layers(self, prepared: Prepared) -> tuple[Block, KeysValues]:
        """Stacked parameters and text of the blocks."""
        return self.blocks, prepared.text

    def bind(
        self,
        layer: tuple[Block, KeysValues],
        prepared: Prepared,
        modulation: TimeModulation,
    ) -> tuple[BoundBlock]:
        """The one block of a layer."""
        block, text = layer
        return (BoundBlock(block, text, prepared.rope, modulation.projected),)

    def head(
        self, tokens: Float[Array, "B N H"], modulation: TimeModulation
    ) -> Float[Array, "B N P"]:
        """Velocity of each patch, float32, flattened as (frame, row, column, channel)."""
        table = self.scale_shift_table[...].astype(jnp.float32) + modulation.embedding[:, None]
        shift, scale = table[:, 0, None], table[:, 1, None]
        x = layer_norm(tokens, self.config.eps) * (1 + scale) + shift
        return self.proj_out(x)

    def unpatchify(
        self, patches: Float[Array, "B N P"], geometry: core.Geometry
    ) -> Float[Array, "B F Y X C"]:
        """Patches back to where they were cut from."""
        patch, channels = self.config.patch_size, self.config.out_channels
        x = patches.reshape(patches.shape[0], *geometry.grid, *patch, channels)
        x = x.transpose(0, 1, 4, 2, 5, 3, 6, 7)
        sizes = (n * p for n, p in zip(geometry.grid, patch, strict=True))
        return x.reshape(patches.shape[0], *sizes, channels)


def with_policy(model: Transformer, dtype: DTypeLike) -> Transformer:
    """The model (or its template) with the dtype that each parameter has under its policy."""

    def cast(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        wide = any(part.startswith(WIDE) for part in name.split("."))
        target = jnp.float32 if wide else dtype
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, target)
        return leaf.astype(target)

    return jax.tree_util.tree_map_with_path(cast, model)
