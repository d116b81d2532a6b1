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

from astraea_ports.wan.block import Attention, Block, RMSNorm, rope_tables
from astraea_ports.wan.config import TransformerConfig
from astraea_ports.wan.training import kernels, passes
from astraea_ports.wan.transformer import Transformer

AttentionKernel = Literal["xla", "cudnn"]
Passes = Literal["xla", "triton"]


class Layout(NamedTuple):
    """How a step is compiled; the numbers do not depend on it, but for rounding.

    Attributes:
      attention: "cudnn" is fused and needs an NVIDIA GPU and 16-bit floats.
      passes: what lies between the products, as XLA compiles it or in kernels of their own, which
        need an NVIDIA GPU.
      recompute: keep the products' results only; norms, rotations and activations again backwards.
      unroll: blocks laid out one after another instead of a loop; slower to compile.
    """

    attention: AttentionKernel = "xla"
    passes: Passes = "xla"
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
            passes="triton",
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
    hidden = passes.gelu(*_project(context, model.text_1))
    text = passes.biased(*_project(hidden, model.text_2))
    rope = rope_tables(geometry.grid, model.config.attention_head_dim)
    modulation = model.time(timestep)

    def apply(tokens: Array, block: Block) -> tuple[Array, None]:
        return _block(block, tokens, text, rope, modulation.projected, layout), None

    if layout.recompute:
        apply = jax.checkpoint(apply, policy=_kept, prevent_cse=layout.unroll)
    unroll = model.config.num_layers if layout.unroll else 1
    # Rounded between sub-layers, as bfloat16 training does: half the traffic of a float32 stream.
    tokens = model.patches(latents).astype(model.patch_embedding.kernel.dtype)
    tokens, _ = jax.lax.scan(apply, tokens, model.blocks, unroll=unroll)
    return model.unpatchify(model.head(tokens, modulation), geometry)


def _kept(primitive, *avals, **params) -> bool:
    """What the forward pass leaves to the backward pass: products, and attention's results."""
    if "dot_product_attention_fwd" in primitive.name:
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *avals, **params)


def _block(block: Block, tokens, text, rope, modulation, layout: Layout) -> Array:
    """One block, as transformer.BoundBlock has it: attention, attention to the text, MLP."""
    between = kernels if layout.passes == "triton" else passes
    table = block.scale_shift_table[...].astype(jnp.float32) + modulation
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (table[:, i, None] for i in range(6))

    attention = block.attn1
    tokens, x = between.enter(tokens, scale, shift, block.eps)
    queries, keys, values = between.heads(
        *_project(x, attention.to_q, attention.to_k, attention.to_v),
        _weights(attention.norm_q, attention.norm_k), rope, block.eps,
    )  # fmt: skip
    out = _out(attention, _attend(attention, queries, keys, values, layout.attention))
    scale, shift = _parameters(block.norm2, gate.shape)
    bias = _bias(attention.to_out)
    tokens, x = between.add(tokens, gate, out, bias, scale, shift, block.norm2.epsilon)

    attention = block.attn2
    (queries,) = between.heads(
        *_project(x, attention.to_q), _weights(attention.norm_q), None, block.eps
    )
    keys, values = between.heads(
        *_project(text, attention.to_k, attention.to_v),
        _weights(attention.norm_k), None, block.eps,
    )  # fmt: skip
    out = _out(attention, _attend(attention, queries, keys, values, layout.attention))
    bias = _bias(attention.to_out)
    one = jnp.ones_like(gate)
    tokens, x = between.add(tokens, one, out, bias, mlp_scale, mlp_shift, block.eps)

    hidden = passes.gelu(*_project(x, block.ffn_in))
    out = passes.product(hidden, block.ffn_out.kernel[...])
    return passes.add_gated(tokens, mlp_gate, out, _bias(block.ffn_out))


def _project(x: Float[Array, "B N I"], *layers: nnx.Linear) -> tuple[Array, Array]:
    """What the layers make of `x` side by side, as one product that reads it once; their biases."""
    kernel = jnp.concatenate([layer.kernel[...] for layer in layers], axis=1)
    return passes.product(x, kernel), jnp.concatenate([_bias(layer) for layer in layers])


def _out(attention: Attention, attended: Array) -> Array:
    return passes.product(attended, attention.to_out.kernel[...])


def _weights(*norms: RMSNorm) -> Array:
    return jnp.stack([norm.weight[...] for norm in norms])


def _parameters(norm: nnx.LayerNorm, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """A norm's own scale and shift, as those of a clip's."""
    assert norm.scale is not None and norm.bias is not None
    scale, shift = (row[...].astype(jnp.float32) for row in (norm.scale, norm.bias))
    return jnp.broadcast_to(scale - 1, shape), jnp.broadcast_to(shift, shape)


def _bias(layer: nnx.Linear) -> Array:
    assert layer.bias is not None
    return layer.bias[...]


def _attend(
    attention: Attention, queries: Array, keys: Array, values: Array, kernel: AttentionKernel
) -> Float[Array, "B K H"]:
    heads = (attention.split(x) for x in (queries, keys, values))
    out = jax.nn.dot_product_attention(*heads, implementation=kernel)
    return out.reshape(queries.shape)
