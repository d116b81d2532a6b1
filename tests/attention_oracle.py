"""Attention in float64, on inputs that are new at every run."""

import os

import jax.numpy as jnp
import numpy as np


def new_seed() -> int:
    """A seed for inputs nobody has seen; the assertion's message names it."""
    return int.from_bytes(os.urandom(4), "little")


def random_inputs(seed, shape, dtype=jnp.float32, spread=1.0):
    batch, queries, keys, heads, width = shape
    rng = np.random.default_rng(seed)
    sizes = (batch, queries, heads, width), *[(batch, keys, heads, width)] * 2
    q, k, v = (jnp.asarray(rng.normal(size=size), dtype) for size in sizes)
    return (q * spread).astype(dtype), k, v


def by_hand(q, k, v, scale=None):
    """Plain softmax attention in float64: (out, lse)."""
    q, k, v = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v))
    logits = np.einsum("bkac,bnac->bakn", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    largest = logits.max(-1, keepdims=True)
    weights = np.exp(logits - largest)
    total = weights.sum(-1, keepdims=True)
    lse = (largest + np.log(total))[..., 0]
    return np.einsum("bakn,bnac->bkac", weights / total, v), lse


def assert_close(got, expected, relative, seed, values=None):
    """Within `relative` of the largest value expected, or of the largest that it is a mean of."""
    error = np.abs(np.asarray(got.astype(jnp.float32), np.float64) - expected).max()
    within = expected if values is None else np.asarray(values.astype(jnp.float32))
    scale = max(1.0, np.abs(within).max())
    assert error <= relative * scale, f"seed {seed}: off by {error:.3g}, values to {scale:.3g}"


def assert_rounded(got, expected, q, k, v, seed, scale=None):
    """Element by element within what the rounding of its weights, then of itself, may do."""
    magnitudes, _ = by_hand(q, k, abs(v), scale)
    rounding = float(jnp.finfo(v.dtype).eps) / 2
    in_float32 = 1e-6 * max(1.0, float(abs(v).max()))
    allowed = rounding * (magnitudes + np.abs(expected)) + in_float32
    worst = (np.abs(np.asarray(got.astype(jnp.float32), np.float64) - expected) / allowed).max()
    assert worst <= 1, f"seed {seed}: off by {worst:.3g} of what rounding may do"
