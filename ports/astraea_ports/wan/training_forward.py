"""The plain transformer, laid out for training: the same numbers, less memory traffic.

Inference keeps keys and values head by head and returns the log-sum-exp; a training step needs
neither, and its time goes to reading and writing activations. So attention runs on [B, N, A, C] as
the projections leave it, fused where the device has such a kernel, and what the backward pass can
cheaply compute again is not stored.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout as DeviceLayout
from jax.experimental.layout import with_layout_constraint
from jaxtyping import Array, Float

from astraea_jax import model as core
from astraea_ports.wan.config import TransformerConfig
from astraea_ports.wan.transformer import (
    Block,
    Transformer,
    layer_norm,
    rope_tables,
    rotate,
)

AttentionKernel = Literal["xla", "cudnn"]


class Layout(NamedTuple):
    """How a step is compiled; the numbers do not depend on it, but for rounding.

    Attributes:
      attention: "cudnn" is fused and needs an NVIDIA GPU and 16-bit floats.
      recompute: keep the products' results only; norms, rotations and activations again backwards.
      unroll: blocks laid out one after another instead of a loop; slower to compile.
    """

    attention: AttentionKernel = "xla"
    recompute: bool = True
    unroll: bool = False

    @classmethod
    def for_device(cls, dtype: str, kept: float) -> "Layout":
        """What suits the default backend.

        Args:
          dtype: of the products.
          kept: of `kept_bytes`, on one device.
        """
        if jax.default_backend() != "gpu":
            return cls()
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
        return cls(
            attention="cudnn" if dtype == "bfloat16" else "xla",
            recompute=3 * kept > limit,
            unroll=True,
        )


def kept_bytes(config: TransformerConfig, tokens: int) -> float:
    """About what a bfloat16 step without recomputation keeps for its backward pass.

    Args:
      config: of the model.
      tokens: of all clips of a batch.
    """
    return float(tokens) * config.num_layers * (30 * config.width + 10 * config.ffn_dim)


def velocity(
    model: Transformer,
    latents: Float[Array, "B F Y X C"],
    timestep: Float[Array, "B"],
    context: Float[Array, "B M D"],
    layout: Layout,
) -> Float[Array, "B F Y X C"]:
    """What `model(latents, timestep, context)` gives, for a step that is differentiated."""
    geometry = model.geometry(latents.shape)
    hidden = jax.nn.gelu(model.text_1(context), approximate=True)
    text = model.text_2(hidden)
    rope = rope_tables(geometry.grid, model.config.attention_head_dim)
    modulation = model.modulation(timestep)

    def apply(tokens: Array, block: Block) -> tuple[Array, None]:
        return _block(block, tokens, text, rope, modulation.projected, layout.attention), None

    if layout.recompute:
        apply = jax.checkpoint(apply, policy=_kept, prevent_cse=layout.unroll)
    unroll = model.config.num_layers if layout.unroll else 1
    # Rounded between sub-layers, as bfloat16 training does: half the traffic of a float32 stream.
    tokens = model.embed(latents).astype(model.patch_embedding.kernel.dtype)
    tokens, _ = jax.lax.scan(apply, tokens, model.blocks, unroll=unroll)
    return model.unpatchify(model.head(tokens, modulation), geometry)


def _kept(primitive, *avals, **params) -> bool:
    """What the forward pass leaves to the backward pass: products, and attention's results."""
    if "dot_product_attention_fwd" in primitive.name:
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *avals, **params)


def _block(block: Block, tokens, text, rope, modulation, kernel: AttentionKernel) -> Array:
    """One block, as transformer.BoundBlock has it: attention, attention to the text, MLP."""
    table = block.scale_shift_table[...].astype(jnp.float32) + modulation
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (table[:, i, None] for i in range(6))
    dtype = tokens.dtype

    attention = block.attn1
    x = (layer_norm(tokens, block.eps) * (1 + scale) + shift).astype(dtype)
    queries, keys, values = _project(x, attention.to_q, attention.to_k, attention.to_v)
    queries = rotate(attention.split(attention.norm_q(queries)), rope)
    keys = rotate(attention.split(attention.norm_k(keys)), rope)
    values = attention.split(values)
    attended = _attend(queries, keys, values, kernel)
    tokens = core.add_gated(tokens, gate, _dense(attention.to_out, attended))

    attention = block.attn2
    x = block.norm2(tokens.astype(jnp.float32)).astype(dtype)
    queries = attention.split(attention.norm_q(_dense(attention.to_q, x)))
    keys, values = _project(text, attention.to_k, attention.to_v)
    keys, values = attention.split(attention.norm_k(keys)), attention.split(values)
    attended = _attend(queries, keys, values, kernel)
    tokens = core.add_gated(tokens, 1.0, _dense(attention.to_out, attended))

    x = layer_norm(tokens, block.eps) * (1 + mlp_scale) + mlp_shift
    hidden = jax.nn.gelu(_dense(block.ffn_in, x.astype(dtype)), approximate=True)
    return core.add_gated(tokens, mlp_gate, _dense(block.ffn_out, hidden))


def _project(x: Float[Array, "B N I"], *layers: nnx.Linear) -> list[Array]:
    """What each layer makes of `x`, as one product that reads `x` once."""
    kernel = jnp.concatenate([layer.kernel[...] for layer in layers], axis=1)
    bias = jnp.concatenate([layer.bias[...] for layer in layers if layer.bias is not None])
    return jnp.split(_product(x, kernel, bias), len(layers), axis=-1)


def _dense(layer: nnx.Linear, x: Float[Array, "B N I"]) -> Float[Array, "B N O"]:
    """What the layer makes of `x`."""
    assert layer.bias is not None
    return _product(x, layer.kernel[...], layer.bias[...])


def _product(x: Array, kernel: Array, bias: Array) -> Array:
    """`x @ kernel + bias` over rows alone.

    With the batch as an axis of its own, XLA lays the tokens out channel by channel, for the sake
    of the kernel's gradient, and every norm becomes a sum over the slowest axis.
    """
    rows = _by_row(x.reshape(-1, x.shape[-1])) @ kernel + bias
    return _by_row(rows).reshape(*x.shape[:-1], -1)


def _by_row(x: Array) -> Array:
    """The same values, laid out row by row, and so their gradient."""
    return with_layout_constraint(x, DeviceLayout(tuple(range(x.ndim))))


def _attend(queries, keys, values, kernel: AttentionKernel) -> Float[Array, "B K H"]:
    out = jax.nn.dot_product_attention(queries, keys, values, implementation=kernel)
    return out.reshape(*out.shape[:2], -1)
