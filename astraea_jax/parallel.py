"""Query-only attention over several devices: heads split, or queries split; for `jax.shard_map`.

The kernels' outputs carry no type of how they vary over a mesh, so that the map needs
`check_vma=False`.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from astraea_jax.attention import Implementation, query_sparse_attention
from astraea_jax.checks import Refusal


def attention_by_heads(
    q: Float[Array, "B K A C"],
    k: Float[Array, "B N A C"],
    v: Float[Array, "B N A C"],
    *,
    axis_name: str,
    count: Int[Array, "B"] | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B K A C"], Float[Array, "B A K"]]:
    """Attention where each device holds a part of the tokens: it computes a part of the heads.

    Args:
      q: this device's part of the selected rows, all heads.
      k: this device's part of the keys, all heads.
      v: this device's part of the values.
      axis_name: axis of the mesh that the tokens are split over.
      count: rows in use of all devices' rows together, the same on each.
      scale: factor on the logits; None means C ** -0.5.
      implementation: see `query_sparse_attention`.

    Returns:
      out and lse of this device's rows, all heads: what q, k and v were gathered for goes back.

    Raises:
      Refusal: heads that can't be split evenly.

    Source: DeepSpeed-Ulysses (two all-to-alls).
    """
    devices = lax.axis_size(axis_name)
    if q.shape[2] % devices:
        raise Refusal(
            f"expected heads in multiples of the {devices} devices of axis {axis_name!r}; "
            f"got {q.shape[2]}: split the queries instead"
        )
    heads_apart = lambda x: lax.all_to_all(x, axis_name, 2, 1, tiled=True)  # noqa: E731
    out, lse = query_sparse_attention(
        *map(heads_apart, (q, k, v)), count=count, scale=scale, implementation=implementation
    )
    out = lax.all_to_all(out, axis_name, 1, 2, tiled=True)
    return out, lax.all_to_all(lse, axis_name, 2, 1, tiled=True)


def attention_by_queries(
    q: Float[Array, "B K A C"],
    k: Float[Array, "B N A C"],
    v: Float[Array, "B N A C"],
    *,
    axis_name: str,
    count: Int[Array, "B"] | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B K A C"], Float[Array, "B A K"]]:
    """Attention of this device's part of the rows to all keys, which every device holds.

    Args:
      q: this device's part of the selected rows.
      k: keys of every token.
      v: values of every token.
      axis_name: axis of the mesh that the rows are split over.
      count: rows in use of all devices' rows together, the same on each.
      scale: factor on the logits; None means C ** -0.5.
      implementation: see `query_sparse_attention`.
    """
    if count is not None:
        count = jnp.clip(count - lax.axis_index(axis_name) * q.shape[1], 0, q.shape[1])
    return query_sparse_attention(q, k, v, count=count, scale=scale, implementation=implementation)
