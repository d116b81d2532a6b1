"""The encoders of T5 (v1.1) and UMT5: prompts' token ids to one vector per token.

Source: https://arxiv.org/abs/1910.10683 and https://arxiv.org/abs/2304.09151 (UMT5: a table of
relative positions for each layer); tensor names as in transformers' `T5EncoderModel` and
`UMT5EncoderModel`.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from astraea_jax.checks import Refusal
from astraea_ports import checkpoints
from astraea_ports.checkpoints import Entry
from astraea_ports.text.t5_config import UMT5_XXL as UMT5_XXL
from astraea_ports.text.t5_config import T5Config as T5Config

_BLOCK = r"encoder\.block\.(?P<layer>\d+)\."
TABLE = (
    Entry(r"shared\.weight", "embedding"),
    Entry(r"encoder\.embed_tokens\.weight", "embedding"),
    Entry(_BLOCK + r"layer\.0\.layer_norm\.weight", "blocks.attention_norm"),
    Entry(_BLOCK + r"layer\.0\.SelfAttention\.([qkvo])\.weight", r"blocks.\2", checkpoints.linear),
    Entry(_BLOCK + r"layer\.0\.SelfAttention\.relative_attention_bias\.weight", "position_bias"),
    Entry(_BLOCK + r"layer\.1\.layer_norm\.weight", "blocks.mlp_norm"),
    Entry(
        _BLOCK + r"layer\.1\.DenseReluDense\.(wi_0|wi_1|wo)\.weight",
        r"blocks.\2",
        checkpoints.linear,
    ),
    Entry(r"encoder\.final_layer_norm\.weight", "final_norm"),
)

_ORIGINAL_BLOCK = r"blocks\.(?P<layer>\d+)\."
ORIGINAL = (
    Entry(r"token_embedding\.weight", "embedding"),
    Entry(_ORIGINAL_BLOCK + r"norm1\.weight", "blocks.attention_norm"),
    Entry(_ORIGINAL_BLOCK + r"attn\.([qkvo])\.weight", r"blocks.\2", checkpoints.linear),
    Entry(_ORIGINAL_BLOCK + r"pos_embedding\.embedding\.weight", "position_bias"),
    Entry(_ORIGINAL_BLOCK + r"norm2\.weight", "blocks.mlp_norm"),
    Entry(_ORIGINAL_BLOCK + r"ffn\.gate\.0\.weight", "blocks.wi_0", checkpoints.linear),
    Entry(_ORIGINAL_BLOCK + r"ffn\.fc1\.weight", "blocks.wi_1", checkpoints.linear),
    Entry(_ORIGINAL_BLOCK + r"ffn\.fc2\.weight", "blocks.wo", checkpoints.linear),
    Entry(r"norm\.weight", "final_norm"),
)
"""The keys of Wan's original UMT5."""

ORIGINAL_FILES = (
    "models_t5_umt5-xxl-enc-bf16.safetensors",
    "models_t5_umt5-xxl-enc-bf16.pth",
)
"""Its file in a model's folder; no config lies beside it."""


@jax.custom_vjp
def look_up(table: Float[Array, "rows H"], ids: Int[Array, "*N"]) -> Float[Array, "*N H"]:
    """`table[ids]`, whose gradient is summed in float32, whatever the table's dtype.

    JAX's own adds each row in that dtype, in any order: in bfloat16 a token that comes a thousand
    times would count as a few hundred.
    """
    return table[ids]


def _look_up_forward(table, ids):
    return table[ids], (ids, table)


def _look_up_backward(saved, gradient):
    ids, table = saved
    chosen = jax.nn.one_hot(ids.ravel(), table.shape[0], dtype=gradient.dtype)
    flat = gradient.reshape(-1, gradient.shape[-1])
    total = jnp.matmul(chosen.T, flat, preferred_element_type=jnp.float32)
    return total.astype(gradient.dtype), None


look_up.defvjp(_look_up_forward, _look_up_backward)


def relative_position_buckets(
    offsets: np.ndarray, num_buckets: int = 32, max_distance: int = 128
) -> np.ndarray:
    """Buckets of relative positions (key minus query), both directions.

    Half of the buckets is for keys after the query; of each half, the first half holds one offset
    each, the rest grows logarithmically up to `max_distance`. On the host in float64: an
    accelerator's log may round an exact boundary (16, 32) into the bucket below.
    """
    half = num_buckets // 2
    exact = half // 2
    distance = np.abs(offsets)
    ratio = np.log(np.maximum(distance, exact) / exact) / math.log(max_distance / exact)
    far = np.minimum(exact + (ratio * (half - exact)).astype(np.int32), half - 1)
    return np.where(offsets > 0, half, 0) + np.where(distance < exact, distance, far)


def rms_norm(x: Float[Array, "*rows H"], weight: Float[Array, " H"], epsilon: float) -> Array:
    """Root-mean-square norm; statistics in float32, result in the weight's dtype."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + epsilon)
    return jax.lax.broadcast_to_rank(weight, x.ndim) * wide.astype(weight.dtype)


class T5Block(nnx.Module):
    """One encoder block: self-attention, then a gated MLP, each with norm and residual."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        """Random weights of a trainable scale."""

        def matrix(rows: int, columns: int, scale: float = 1.0) -> nnx.Param:
            values = jax.random.normal(rngs.params(), (rows, columns), jnp.float32)
            return nnx.Param(values * (scale * rows**-0.5))

        inner = config.num_heads * config.d_kv
        self.config = config
        self.attention_norm = nnx.Param(jnp.ones(config.d_model, jnp.float32))
        # The scores are not divided by sqrt(d_kv), so the first queries are.
        self.q = matrix(config.d_model, inner, config.d_kv**-0.5)
        self.k = matrix(config.d_model, inner)
        self.v = matrix(config.d_model, inner)
        self.o = matrix(inner, config.d_model)
        self.mlp_norm = nnx.Param(jnp.ones(config.d_model, jnp.float32))
        self.wi_0 = matrix(config.d_model, config.d_ff)
        self.wi_1 = matrix(config.d_model, config.d_ff)
        self.wo = matrix(config.d_ff, config.d_model)

    def __call__(
        self,
        x: Float[Array, "B L H"],
        bias: Float[Array, "A L L"],
        mask: Int[Array, "B L"],
    ) -> Float[Array, "B L H"]:
        """One block. `bias` is added to the scores; keys where `mask` is 0 are left out."""
        epsilon = self.config.layer_norm_epsilon
        normed = rms_norm(x, self.attention_norm[...], epsilon)
        x = x + self._attend(normed, bias, mask)
        normed = rms_norm(x, self.mlp_norm[...], epsilon)
        gate = jax.nn.gelu(normed @ self.wi_0[...], approximate=True)
        return x + (gate * (normed @ self.wi_1[...])) @ self.wo[...]

    def _attend(self, x: Array, bias: Array, mask: Array) -> Array:
        heads = (*x.shape[:2], self.config.num_heads, self.config.d_kv)
        q, k, v = ((x @ weight[...]).reshape(heads) for weight in (self.q, self.k, self.v))
        scores = jnp.einsum("bqad,bkad->baqk", q, k).astype(jnp.float32) + bias[None]
        scores = jnp.where(mask[:, None, None, :] > 0, scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        out = jnp.einsum("baqk,bkad->bqad", weights, v)
        return out.reshape(*x.shape[:2], -1) @ self.o[...]


class T5Encoder(nnx.Module):
    """Embedding, blocks stacked on a leading axis, final norm; computes in its weights' dtype."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        """Random weights of a trainable scale."""
        self.config = config
        self.embedding = nnx.Param(
            jax.random.normal(rngs.params(), (config.vocab_size, config.d_model), jnp.float32)
        )
        num_tables = 1 if config.shared_position_bias else config.num_layers
        table = (num_tables, config.relative_attention_num_buckets, config.num_heads)
        self.position_bias = nnx.Param(jax.random.normal(rngs.params(), table, jnp.float32) * 0.1)
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.blocks = jax.vmap(lambda key: T5Block(config, nnx.Rngs(key)))(keys)
        self.final_norm = nnx.Param(jnp.ones(config.d_model, jnp.float32))

    def __call__(self, ids: Int[Array, "B L"], mask: Int[Array, "B L"]) -> Float[Array, "B L H"]:
        """Encodes token ids.

        Args:
          ids: of tokens, 0..vocab_size-1.
          mask: 1 for tokens, 0 for padding, which no token attends to.

        Returns:
          The final hidden states of all rows; those of padding are not zeroed.

        Raises:
          Refusal: the shapes are not [B, L] twice.
        """
        if ids.ndim != 2 or ids.shape != mask.shape:
            raise Refusal(
                f"expected ids and mask of one shape [prompts, tokens], got {list(ids.shape)} and "
                f"{list(mask.shape)}; pass what the tokenizer gives"
            )
        x = look_up(self.embedding[...], ids)
        tables = self.position_bias[...]
        tables = jnp.broadcast_to(tables, (self.config.num_layers, *tables.shape[1:]))

        def step(x: Array, layer: tuple[T5Block, Array]) -> tuple[Array, None]:
            block, table = layer
            return block(x, self.bias(table, ids.shape[1]), mask), None

        x, _ = jax.lax.scan(step, x, (self.blocks, tables))
        return rms_norm(x, self.final_norm[...], self.config.layer_norm_epsilon)

    def bias(self, table: Float[Array, "buckets A"], length: int) -> Float[Array, "A L L"]:
        """A layer's addend to its attention scores, from its table of relative positions."""
        positions = np.arange(length)
        buckets = relative_position_buckets(
            positions[None, :] - positions[:, None],
            self.config.relative_attention_num_buckets,
            self.config.relative_attention_max_distance,
        )
        return jnp.moveaxis(look_up(table, jnp.asarray(buckets)), -1, 0)


def open_text_encoder(
    source: checkpoints.Source,
    *,
    config: Mapping[str, Any] | T5Config | None = None,
    dtype: DTypeLike | None = None,
    revision: str | None = None,
) -> checkpoints.Loadable[T5Encoder]:
    """Finds an encoder and holds its headers against its config; see `load_text_encoder`."""
    if dtype is not None:
        checkpoints.float_dtype(dtype)
    config = config.to_dict() if isinstance(config, T5Config) else config
    place = checkpoints.find_part(
        source,
        folder="text_encoder",
        kinds=("umt5", "t5"),
        config=config,
        single=ORIGINAL_FILES,
        revision=revision,
        single_config=UMT5_XXL,
    )
    parsed = T5Config.from_dict(place.config, name=f"the text encoder's config of {source}")
    template = jax.eval_shape(lambda: T5Encoder(parsed, nnx.Rngs(0)))
    template = template if dtype is None else checkpoints.with_dtype(template, dtype)
    return checkpoints.open_checkpoint(place.weights(), template, TABLE, ORIGINAL)


def load_text_encoder(
    source: checkpoints.Source,
    *,
    config: Mapping[str, Any] | T5Config | None = None,
    dtype: DTypeLike | None = None,
    revision: str | None = None,
) -> T5Encoder:
    """Loads an encoder in transformers' layout or Wan's original one.

    Args:
      source: a folder with config.json and the weights, a whole model's folder or hub id, or a
        single file of weights (.safetensors; .pth where torch is installed).
      config: what config.json holds; needed with a single file that has none beside it and is not
        the original's.
      dtype: of the parameters and of the computation; None is float32.
      revision: of a hub id: a branch, a tag or a commit.

    Raises:
      Refusal: the config or the weights are missing, broken, or don't fit.
    """
    return open_text_encoder(source, config=config, dtype=dtype, revision=revision).load()
