"""The gradient of attention and of its log-sum-exp, recomputed tile by tile of keys in XLA."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

KEY_TILE = 512


def gradient(
    q: Float[Array, "B K A C"],
    k: Float[Array, "B N A C"],
    v: Float[Array, "B N A C"],
    out: Float[Array, "B K A C"],
    lse: Float[Array, "B A K"],
    out_gradient: Float[Array, "B K A C"],
    lse_gradient: Float[Array, "B A K"],
    *,
    scale: float,
) -> tuple[Float[Array, "B K A C"], Float[Array, "B N A C"], Float[Array, "B N A C"]]:
    """Gradients of q, k and v; rows whose lse is -inf (not in use) have none and give none.

    The scores held at once are [B, A, K, KEY_TILE] float32.

    Source: FlashAttention-2, Algorithm 2; the gradient of the log-sum-exp is the softmax.
    """
    used = ~jnp.isneginf(lse)
    safe = jnp.where(used, lse, 0.0)
    # d lse / d score = weight, d out / d score = weight * (value - out).
    offset = jnp.einsum("bkac,bkac->bak", out_gradient.astype(jnp.float32), out.astype(jnp.float32))
    offset = jnp.where(used, lse_gradient - offset, 0.0)

    def tile(q_gradient, index):
        first = jnp.minimum(index * KEY_TILE, k.shape[1] - size)
        # The last tile is moved back to fit, and the keys that it would count twice are masked.
        fresh = first + jnp.arange(size, dtype=jnp.int32) >= index * KEY_TILE
        keys = lax.dynamic_slice_in_dim(k, first, size, 1)
        values = lax.dynamic_slice_in_dim(v, first, size, 1)
        scores = _einsum("bkac,bnac->bakn", q, keys) * scale
        weights = jnp.exp(scores - safe[..., None])
        weights = jnp.where(used[..., None] & fresh, weights, 0.0)
        value_gradient = _einsum("bakn,bkac->bnac", weights.astype(v.dtype), out_gradient)
        change = _einsum("bkac,bnac->bakn", out_gradient, values) + offset[..., None]
        score_gradient = (weights * change * scale).astype(q.dtype)
        q_gradient += _einsum("bakn,bnac->bkac", score_gradient, keys)
        key_gradient = _einsum("bakn,bkac->bnac", score_gradient, q)
        return q_gradient, (first, key_gradient, value_gradient)

    size = min(KEY_TILE, k.shape[1])
    num_tiles = -(-k.shape[1] // size)
    start = jnp.zeros_like(q, jnp.float32)
    q_gradient, (_, *tiles) = lax.scan(tile, start, jnp.arange(num_tiles, dtype=jnp.int32))
    k_gradient, v_gradient = (_join(parts, k.shape[1]) for parts in tiles)
    return q_gradient.astype(q.dtype), k_gradient.astype(k.dtype), v_gradient.astype(v.dtype)


def _join(parts: Float[Array, "T B S A C"], num_keys: int) -> Float[Array, "B N A C"]:
    """Tiles of keys one after another; the last one ends where the keys end."""
    num_tiles, batch, size, *rest = parts.shape
    whole = jnp.moveaxis(parts[:-1], 0, 1).reshape(batch, -1, *rest)
    fresh = num_keys - (num_tiles - 1) * size
    return jnp.concatenate([whole, parts[-1][:, size - fresh :]], axis=1)


def _einsum(expression, a, b):
    return jnp.einsum(expression, a, b, preferred_element_type=jnp.float32)
