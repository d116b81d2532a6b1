"""A block of the Wan 2.1 transformer: its parameters, and its sub-layers apart.

Source: Wan-Video/Wan2.1 wan/modules/model.py; Diffusers transformer_wan (key names).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from astraea_jax import model as core
from astraea_jax.attention import attention_entropy, query_sparse_attention
from astraea_ports.wan.config import TransformerConfig


class RMSNorm(nnx.Module):
    """Root-mean-square norm over all channels, statistics in float32."""

    def __init__(self, width: int, eps: float):
        self.weight = nnx.Param(jnp.ones((width,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows H"]) -> Float[Array, "*rows H"]:
        """Normed rows in the dtype of `x`."""
        return self.scaled(x, self.factor(x))

    def factor(self, x: Float[Array, "*rows H"]) -> Float[Array, "*rows 1"]:
        """One over the root mean square of each row, float32."""
        y = x.astype(jnp.float32)
        return jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)

    def scaled(
        self, x: Float[Array, "*rows H"], factor: Float[Array, "*rows 1"]
    ) -> Float[Array, "*rows H"]:
        """Rows times their factor and the weight, in the dtype of `x`."""
        weight = jax.lax.broadcast_to_rank(self.weight[...], x.ndim)
        return (x.astype(jnp.float32) * factor * weight).astype(x.dtype)


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
    tables = (table[..., :, None, :, None] for table in rope)
    cos, sin = (jax.lax.broadcast_to_rank(table, pairs.ndim) for table in tables)
    signs = np.array([-1, 1], np.float32).reshape((1,) * (pairs.ndim - 1) + (2,))
    # A reversal and no stack: on a GPU two halves would be written by turns, at half the speed.
    turned = pairs * cos + pairs[..., ::-1] * (sin * signs)
    return turned.reshape(x.shape).astype(x.dtype)


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

    def turned(
        self, norm: RMSNorm, x: Float[Array, "B K H"], rope: Rope
    ) -> Float[Array, "B K A C"]:
        """Normed, split and rotated.

        With the statistics held as values of their own, the norm and the rotation are one pass.
        """
        factor = jax.lax.optimization_barrier(norm.factor(x))
        return rotate(self.split(norm.scaled(x, factor)), rope)


class Block(nnx.Module):
    """Parameters of one transformer block."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        width = config.width
        self.attn1 = Attention(config, rngs)
        self.attn2 = Attention(config, rngs)
        self.norm2 = nnx.LayerNorm(width, epsilon=config.eps, use_fast_variance=False, rngs=rngs)
        self.ffn_in = nnx.Linear(width, config.ffn_dim, rngs=rngs)
        self.ffn_out = nnx.Linear(config.ffn_dim, width, rngs=rngs)
        table = jax.random.normal(rngs.params(), (6, width), jnp.float32) / width**0.5
        self.scale_shift_table = nnx.Param(table)
        self.eps = config.eps


class KeysValues(NamedTuple):
    """Keys and values of every token, or of the text, [B, N, A, C]."""

    keys: Array
    values: Array


class BoundBlock:
    """A block with its text, rotary tables and this step's modulation; see core.Block."""

    def __init__(self, block: Block, text: KeysValues, rope: Rope, modulation: Array):
        self.block, self.text, self.rope = block, text, rope
        self.dtype = block.ffn_in.kernel.dtype  # of the products; rows may be wider
        # Held as a value of its own: fused into the rows' loops it is added again for every row.
        total = jax.lax.optimization_barrier(
            block.scale_shift_table[...].astype(jnp.float32)[None] + modulation
        )
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (
            total[:, index, None] for index in range(6)
        )
        self.entry = core.EntryNorm(scale, shift, block.eps, self.dtype)
        self.mlp_shift, self.mlp_scale = mlp_shift, mlp_scale
        self.parts = (
            core.Part("self", gate, self.self_attention, shares=True),
            core.Part("cross", 1.0, self.cross_attention),
            core.Part("mlp", mlp_gate, self.mlp),
        )

    def shared(self, tokens: core.Rows, side: core.Side) -> tuple[KeysValues, core.Side]:
        """Normed, rotated keys and plain values of every token; nothing goes beside them."""
        attention = self.block.attn1
        x = self.entry(tokens)
        keys = attention.turned(attention.norm_k, attention.to_k(x), self.rope)
        return KeysValues(keys, attention.split(attention.to_v(x))), side

    def self_attention(self, rows: core.Rows, keys_values: KeysValues) -> core.PartOut:
        """Rows attend to every token; queries turn by their own position in the video."""
        attention = self.block.attn1
        rope = self.rope
        if rows.indices is not None:
            rope = Rope(*(table.at[rows.indices].get(mode="clip") for table in rope))
        queries = attention.turned(attention.norm_q, attention.to_q(self.entry(rows)), rope)
        out, lse = query_sparse_attention(queries, *keys_values)
        return core.PartOut(attention.to_out(out.reshape(rows.values.shape)), lse)

    def cross_attention(self, rows: core.Rows, keys_values: KeysValues | None) -> core.PartOut:
        """Rows attend to the text, padding included, as the model was trained."""
        del keys_values  # those of the video's tokens
        attention, norm = self.block.attn2, self.block.norm2
        x = norm(rows.values.astype(jnp.float32))
        queries = attention.split(attention.norm_q(attention.to_q(x.astype(self.dtype))))
        out, _ = query_sparse_attention(queries, *self.text)
        return core.PartOut(
            attention.to_out(out.reshape(rows.values.shape)),
            entropy=lambda: attention_entropy(queries, self.text.keys),
        )

    def mlp(self, rows: core.Rows, keys_values: KeysValues | None) -> core.PartOut:
        """Feed-forward with the tanh GELU."""
        del keys_values
        x = core.layer_norm(rows.values, self.block.eps) * (1 + self.mlp_scale) + self.mlp_shift
        hidden = self.block.ffn_in(x.astype(self.dtype))
        return core.PartOut(self.block.ffn_out(jax.nn.gelu(hidden, approximate=True)))
