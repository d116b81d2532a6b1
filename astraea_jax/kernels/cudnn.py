"""Query-only attention through cuDNN: gathered queries, fused attention, float32 log-sum-exp.

`jax.nn.dot_product_attention(implementation="cudnn", return_residual=True)` casts the log-sum-exp
to the dtype of the output, which for bfloat16 leaves two decimal digits; the float32 one is only to
be had from the function beneath, which JAX keeps private.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from astraea_jax.kernels import machine, rows
from astraea_jax.kernels.machine import Gpu


def refusal(here: Gpu, width: int, dtype) -> str | None:
    """Why cuDNN can't take this; None if it can."""
    if reason := machine.refusal(here, width, dtype):
        return reason
    if width % 8:
        return f"takes head widths in steps of 8; got {width}: pad it, or use xla"
    try:
        from jax._src.cudnn import fused_attention_stablehlo as fused

        fused.check_cudnn_version()
    except (ImportError, AttributeError, RuntimeError) as error:
        return f"needs cuDNN, and the attention through it that JAX keeps private ({error})"
    return None


def attend(
    q: Float[Array, "B K A C"],
    k: Float[Array, "B N A C"],
    v: Float[Array, "B N A C"],
    count: Int[Array, "B"] | None,
    *,
    scale: float,
) -> tuple[Float[Array, "B K A C"], Float[Array, "B A K"]]:
    """See `astraea_jax.attention.query_sparse_attention`."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    lengths, mask_type = (None, None), fused.MaskType.NO_MASK
    if count is not None:
        # cuDNN has no empty row of the batch: it computes one query, and it is masked here.
        keys = jnp.full_like(count, k.shape[1])
        lengths, mask_type = (jnp.maximum(count, 1), keys), fused.MaskType.PADDING
    results: Any = fused.dot_product_attention(
        q, k, v, None, None, *lengths, scale=scale, mask_type=mask_type, return_residual=True
    )
    return rows.blank_past(count, *results)
