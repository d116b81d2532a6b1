"""Query-only sparse attention: some queries, all keys and values, and the log-sum-exp beside.

Given every key and value, a row of attention depends on no other row, so computing only the
selected queries gives exactly the rows that dense attention would give.
"""

import contextlib
import functools

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from astraea_jax import checks
from astraea_jax.checks import Refusal
from astraea_jax.kernels import dispatch, rows
from astraea_jax.kernels.dispatch import Implementation as Implementation
from astraea_jax.kernels.dispatch import implementations as implementations

# Tile sizes of the XLA reference: scores held at once are [B, A, QUERY_TILE, KEY_TILE] float32.
QUERY_TILE = 2048
KEY_TILE = 2048

LARGEST_SCALE = 1e4
"""Factor on the logits, either way; models have one below 1."""


def query_sparse_attention(
    q: Float[Array, "B M A C"],
    k: Float[Array, "B N A C"],
    v: Float[Array, "B N A C"],
    *,
    indices: Int[Array, "B K"] | None = None,
    count: Int[Array, "B"] | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B _ A C"], Float[Array, "B A _"]]:
    """Attention of selected query rows to all keys and values.

    Args:
      q: selected queries, already gathered (K = M); or, with `indices`, the queries of all tokens.
      k: keys of every token.
      v: values of every token, in the dtype of `k`.
      indices: rows of `q` to compute, in 0..M-1; one past the end counts as the last.
      count: rows that are in use, per batch row, in 0..K; None means all.
      scale: factor on the logits; None means C ** -0.5.
      implementation: "xla" (online softmax over tiles of keys, never a K x N matrix at size),
        "cudnn", "triton" or "mosaic" (Hopper); None for the best that runs, chosen by platform when
        the program is lowered and by compute capability. Only xla takes float32, or runs without
        an NVIDIA GPU.

    Returns:
      out: [B, K, A, C] in the dtype of `v`; rows at or past `count` are 0.
      lse: [B, A, K] float32, the natural logarithm of the sum of the exponentials of the scaled
        logits; rows at or past `count` are -inf.

    Raises:
      Refusal: shapes or dtypes that do not fit, no key, an index out of range where the indices
        are known, or a named implementation that can't run, with the reason.

    Source: ASTRAEA 3.2, Figure 3 and Algorithm 1 lines 3-5.
    """
    _check(q, k, v, indices, count, scale)
    num_queries = q.shape[1] if indices is None else indices.shape[1]
    name, by_platform = dispatch.choose(implementation, q, k, num_queries)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if name == "xla":
        # Not through the kernels' gradient: XLA differentiates its own.
        return _xla(q, k, v, count, indices, factor)
    settings = dispatch.Settings(name, factor, _xla if by_platform else None)
    return dispatch.attend(settings, q, k, v, count, indices)


def gather_rows(
    values: Float[Array, "B N *rest"], indices: Int[Array, "B K"]
) -> Float[Array, "B K *rest"]:
    """Rows of `values` at `indices`; an index past the end gives the last row."""
    return rows.take(values, indices)


def scatter_rows(
    values: Float[Array, "B N *rest"], indices: Int[Array, "B K"], news: Float[Array, "B K *rest"]
) -> Float[Array, "B N *rest"]:
    """`values` with `news` put at `indices` (no two alike); an index past the end is dropped."""
    batch = jnp.arange(values.shape[0], dtype=jnp.int32)[:, None]
    return values.at[batch, indices].set(news, mode="drop", unique_indices=True)


def attention_entropy(
    q: Float[Array, "B K A C"], k: Float[Array, "B M A C"], *, scale: float | None = None
) -> Float[Array, "B K"]:
    """Entropy in nats, 0..ln M, of the mean over the heads of each row's attention; float32.

    Args:
      q: queries.
      k: keys, few: each head makes a K x M matrix, one after another.
      scale: of the logits; None is C ** -0.5.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale

    def add(total, head):
        queries, keys = head
        logits = jnp.einsum("bkc,bmc->bkm", queries, keys, preferred_element_type=jnp.float32)
        return total + jax.nn.softmax(logits * factor, axis=-1), None

    start = jnp.zeros_like(q, jnp.float32, (*q.shape[:2], k.shape[1]))
    total, _ = lax.scan(add, start, (jnp.moveaxis(q, 2, 0), jnp.moveaxis(k, 2, 0)))
    return jax.scipy.special.entr(total / q.shape[2]).sum(axis=-1)


def _xla(q, k, v, count, indices, scale):
    """The reference, on any platform."""
    if indices is not None:
        q = gather_rows(q, indices)
    # On a GPU, float32 products are rounded to TF32 unless more is asked for.
    exact = dispatch.gpu() is not None and q.dtype == jnp.float32
    with jax.default_matmul_precision("highest") if exact else contextlib.nullcontext():
        if q.dtype == jnp.float32:
            out, lse = _tiled(q * jnp.asarray(scale, q.dtype), k, v)
        else:  # a scaled query would be rounded again, and the log-sum-exp with it
            out, lse = _tiled(q, k, v, scale)
    return rows.blank_past(count, out, lse)


def _tiled(q, k, v, scale=None):
    """Splits the queries into tiles, so that the scores held at once stay bounded.

    `scale` is a factor on the scores; None where the queries are scaled.
    """
    batch, num_queries, heads, width = q.shape
    if num_queries <= QUERY_TILE:
        return _online_softmax(q, k, v, scale)
    num_tiles = -(-num_queries // QUERY_TILE)
    padding = num_tiles * QUERY_TILE - num_queries
    tiles = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
    tiles = tiles.reshape(batch, num_tiles, QUERY_TILE, heads, width).swapaxes(0, 1)
    out, lse = lax.map(lambda tile: _online_softmax(tile, k, v, scale), tiles)
    out = out.swapaxes(0, 1).reshape(batch, -1, heads, width)[:, :num_queries]
    lse = jnp.moveaxis(lse, 0, 2).reshape(batch, heads, -1)[:, :, :num_queries]
    return out, lse


def _online_softmax(q, k, v, scale):
    """Softmax attention of one tile of queries, over tiles of keys."""
    batch, num_queries, heads, width = q.shape
    num_keys = k.shape[1]
    if num_keys <= KEY_TILE:
        total, normaliser, largest = _tile(q, k, v, scale, None)
    else:
        rows = (batch, heads, num_queries)
        # Like the queries also in how they differ over devices, where a `shard_map` checks it.
        start = (
            jnp.zeros_like(q, jnp.float32, (*rows, width)),
            jnp.zeros_like(q, jnp.float32, rows),
            jnp.full_like(q, -jnp.inf, jnp.float32, rows),
        )
        num_tiles = -(-num_keys // KEY_TILE)
        body = functools.partial(_add_tile, q=q, k=k, v=v, scale=scale)
        total, normaliser, largest = lax.fori_loop(0, num_tiles, body, start)
    # Without the barrier, whether the LSE is used decides how the softmax is fused, and with it the
    # last bits of the output: a dense step with a cache would not equal the plain model.
    total, normaliser, largest = lax.optimization_barrier((total, normaliser, largest))
    out = (total / normaliser[..., None]).astype(v.dtype)
    return out.swapaxes(1, 2), largest + jnp.log(normaliser)


def _add_tile(index, carry, *, q, k, v, scale):
    """Folds one tile of keys into the running softmax."""
    total, normaliser, largest = carry
    # The last tile is moved back to fit, and the keys it would count twice are masked.
    first = jnp.minimum(index * KEY_TILE, k.shape[1] - KEY_TILE)
    fresh = first + jnp.arange(KEY_TILE, dtype=jnp.int32) >= index * KEY_TILE
    k_tile = lax.dynamic_slice_in_dim(k, first, KEY_TILE, 1)
    v_tile = lax.dynamic_slice_in_dim(v, first, KEY_TILE, 1)
    tile_total, tile_normaliser, tile_largest = _tile(q, k_tile, v_tile, scale, fresh)
    new_largest = jnp.maximum(largest, tile_largest)
    keep, add = jnp.exp(largest - new_largest), jnp.exp(tile_largest - new_largest)
    return (
        total * keep[..., None] + tile_total * add[..., None],
        normaliser * keep + tile_normaliser * add,
        new_largest,
    )


def _tile(q, k, v, scale, fresh):
    """Unnormalised attention to one tile: (total [B,A,K,C], normaliser, largest [B,A,K])."""
    # XLA wants the keys turned around; fused into what made them (a norm, a rotation), that turning
    # takes on a CPU three times as long as after it: 4 % of a whole step.
    k = lax.optimization_barrier(k)
    scores = jnp.einsum("bkac,bnac->bakn", q, k, preferred_element_type=jnp.float32)
    if scale is not None:
        scores *= scale
    if fresh is not None:
        scores = jnp.where(fresh, scores, -jnp.inf)
    largest = scores.max(axis=-1)
    weights = jnp.exp(scores - largest[..., None])
    normaliser = weights.sum(axis=-1)
    total = jnp.einsum(
        "bakn,bnac->bakc", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return total, normaliser, largest


def _check(q, k, v, indices, count, scale) -> None:
    """Refuses what no implementation could compute, at trace time."""
    named = {"q": q, "k": k, "v": v, "indices": indices, "count": count}
    for name, value in named.items():
        if value is None and name in ("indices", "count"):
            continue
        kind = jnp.floating if name in ("q", "k", "v") else jnp.integer
        dtype = checks.array(name, value).dtype
        if not jnp.issubdtype(dtype, kind):
            raise Refusal(f"{name} must be an array of {kind.__name__} numbers; got {dtype}")
    if scale is not None and not isinstance(scale, jax.Array):
        checks.number("scale", scale, -LARGEST_SCALE, LARGEST_SCALE)
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise Refusal(
            "expected q [B,K,A,C] and k, v [B,N,A,C] of one shape; "
            f"got q {q.shape}, k {k.shape}, v {v.shape}"
        )
    if (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise Refusal(
            "expected q and k to agree in batch, heads and head width; "
            f"got q {q.shape} and k {k.shape}"
        )
    if indices is not None and (indices.ndim != 2 or indices.shape[0] != q.shape[0]):
        raise Refusal(f"expected indices of shape ({q.shape[0]}, K); got {indices.shape}")
    num_queries = q.shape[1] if indices is None else indices.shape[1]
    if 0 in (q.shape[1], num_queries, k.shape[1]):
        raise Refusal(
            "expected at least one query and one key; "
            f"got {min(q.shape[1], num_queries)} and {k.shape[1]}"
        )
    if not (q.dtype == k.dtype == v.dtype):
        raise Refusal(f"expected one dtype; got q {q.dtype}, k {k.dtype}, v {v.dtype}: cast one")
    if count is not None and count.shape != (q.shape[0],):
        raise Refusal(f"expected count of shape ({q.shape[0]},); got {count.shape}")
    if indices is not None and count is None and not isinstance(indices, jax.core.Tracer):
        known = np.asarray(indices)
        if known.min() < 0 or known.max() >= q.shape[1]:
            raise Refusal(
                f"expected indices in 0..{q.shape[1] - 1}; got {known.min()}..{known.max()}: "
                "give the number of rows in use as count, if the rest is padding"
            )
