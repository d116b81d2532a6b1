"""Rows of tokens: those at some indices, and those past the ones in use."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def take(
    values: Float[Array, "B N *rest"], indices: Int[Array, "B K"]
) -> Float[Array, "B K *rest"]:
    """Rows of `values` at `indices`; an index past the end gives the last."""
    return jax.vmap(lambda rows, index: rows.at[index].get(mode="clip"))(values, indices)


def blank_past(
    count: Int[Array, "B"] | None, out: Float[Array, "B K A C"], lse: Float[Array, "B A K"]
) -> tuple[Float[Array, "B K A C"], Float[Array, "B A K"]]:
    """Results of attention with 0 and -inf in the rows past `count`; None means all are in use."""
    if count is None:
        return out, lse
    used = jnp.arange(out.shape[1], dtype=jnp.int32) < count[:, None]
    return jnp.where(used[:, :, None, None], out, 0), jnp.where(used[:, None], lse, -jnp.inf)
