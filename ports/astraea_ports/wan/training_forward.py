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
from jaxtyping import Array, Float

from astraea_ports.wan import training_passes as passes
from astraea_ports.wan.block import Attention, Block, RMSNorm, Rope, rope_tables
from astraea_ports.wan.config import TransformerConfig
from astraea_ports.wan.transformer import Transformer

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
    return float(tokens) * config.num_layers * 2 * (18 * config.width + 2 * config.ffn_dim)


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

    attention = block.attn1
    x = passes.normed(tokens, scale, shift, block.eps)
    queries, keys, values = _project(x, attention.to_q, attention.to_k, attention.to_v)
    queries = _turned(attention.norm_q, queries, attention.to_q, rope)
    keys = _turned(attention.norm_k, keys, attention.to_k, rope)
    values = values + _bias(attention.to_v)
    attended = _attend(attention, queries, keys, values, kernel)
    tokens = _add_projected(tokens, gate, attention.to_out, attended)

    attention, norm = block.attn2, block.norm2
    assert norm.scale is not None and norm.bias is not None
    scale, shift = (row[...].astype(jnp.float32) for row in (norm.scale, norm.bias))
    scale, shift = (jnp.broadcast_to(row, gate.shape) for row in (scale - 1, shift))
    x = passes.normed(tokens, scale, shift, norm.epsilon)
    queries = passes.product(x, attention.to_q.kernel[...])
    queries = _turned(attention.norm_q, queries, attention.to_q, None)
    keys, values = _project(text, attention.to_k, attention.to_v)
    keys = attention.norm_k(keys + _bias(attention.to_k))
    values = values + _bias(attention.to_v)
    attended = _attend(attention, queries, keys, values, kernel)
    tokens = _add_projected(tokens, jnp.ones_like(gate), attention.to_out, attended)

    x = passes.normed(tokens, mlp_scale, mlp_shift, block.eps)
    hidden = passes.product(x, block.ffn_in.kernel[...])
    hidden = passes.gelu(hidden, _bias(block.ffn_in))
    return _add_projected(tokens, mlp_gate, block.ffn_out, hidden)


def _project(x: Float[Array, "B N I"], *layers: nnx.Linear) -> list[Array]:
    """What each layer makes of `x` but for its bias, as one product that reads `x` once."""
    kernel = jnp.concatenate([layer.kernel[...] for layer in layers], axis=1)
    return jnp.split(passes.product(x, kernel), len(layers), axis=-1)


def _add_projected(tokens: Array, gate: Array, layer: nnx.Linear, x: Array) -> Array:
    """Tokens and, gated, what the layer makes of `x`."""
    return passes.add_gated(tokens, gate, passes.product(x, layer.kernel[...]), _bias(layer))


def _turned(norm: RMSNorm, x: Array, layer: nnx.Linear, rope: Rope | None) -> Array:
    return passes.turned(x, _bias(layer), norm.weight[...], rope, norm.eps)


def _bias(layer: nnx.Linear) -> Array:
    assert layer.bias is not None
    return layer.bias[...]


def _attend(
    attention: Attention, queries: Array, keys: Array, values: Array, kernel: AttentionKernel
) -> Float[Array, "B K H"]:
    heads = (attention.split(x) for x in (queries, keys, values))
    out = jax.nn.dot_product_attention(*heads, implementation=kernel)
    return out.reshape(queries.shape)
