"""Tokens enter a block in one pass over memory: merged, normed and modulated. Pallas Triton.

A program takes a token. It reads one row where the token is fresh and two where it is stale, and
writes two. Apart, adding what is cached, putting the fresh rows and norming read three rows of each
token and write two, and one more of each where the token is fresh.

ptxas 13.0 for sm_90 (jax 0.11.2): 48 registers for width 1536, 47 for 5120; no spills.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.triton as pltriton
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

WARP = 1024
"""Channels that a warp takes at most: with more, registers spill."""

WIDEST_PART = 1024
MOST_PARTS = 8


def part_width(width: int) -> int | None:
    """Channels of a part, a power of two, so that parts cover the width; None if too many would.

    The parts of a row are added up number by number, and summed over threads once.
    """
    part = min(width & -width, WIDEST_PART)
    return part if width // part <= MOST_PARTS else None


def enter(
    tokens: Float[Array, "B N H"],
    rows: Float[Array, "B K H"],
    slots: Int[Array, "B N"],
    stack: Float[Array, "L B N H"],
    index: Int[Array, ""],
    scale: Float[Array, "B 1 H"],
    shift: Float[Array, "B 1 H"],
    *,
    eps: float,
    interpret: bool = False,
) -> tuple[Float[Array, "B N H"], Float[Array, "B N H"]]:
    """The tokens that enter a block, and what its self-attention reads of them.

    The whole cache is an operand, and no slice of it: that would be copied.

    Args:
      tokens: that entered the block before, or that enter this one where it is the first; the
        merged ones are written over them.
      rows: fresh rows that left the block before, in the dtype of `tokens`.
      slots: which of the rows is a token's; negative for a stale one.
      stack: what each block added to each token when it was last computed.
      index: of the block that is entered.
      scale: float32, added to one.
      shift: float32.
      eps: of the norm.
      interpret: run on a CPU.

    Returns:
      merged: rows where tokens are fresh, else tokens plus what the block before had added.
      normed: merged, normed to mean 0 and variance 1, scaled and shifted; in the same dtype.
    """
    batch, num_tokens, width = tokens.shape
    part = part_width(width)
    assert part is not None, width
    warps = pl.next_power_of_2(pl.cdiv(width, WARP))
    shape = jax.ShapeDtypeStruct(tokens.shape, tokens.dtype)
    return pl.pallas_call(
        functools.partial(_program, part=part, eps=eps),
        out_shape=(shape, shape),
        grid=(num_tokens, batch),
        # In place: else the loop over blocks copies what leaves back to where it entered.
        input_output_aliases={0: 0},
        compiler_params=pltriton.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name="enter_block",
    )(tokens, rows, slots.astype(jnp.int32), stack, index.astype(jnp.int32)[None], scale, shift)


def _program(
    tokens_ref, rows_ref, slots_ref, stack_ref, index_ref, scale_ref, shift_ref,
    merged_ref, normed_ref, *, part, eps,
):  # fmt: skip
    """One token."""
    token, batch = pl.program_id(0), pl.program_id(1)
    width = tokens_ref.shape[-1]
    columns = [first + jnp.arange(part) for first in range(0, width, part)]
    slot, index = slots_ref[batch, token], index_ref[0]

    def fresh():
        return tuple(pltriton.load(rows_ref.at[batch, slot, some]) for some in columns)

    def stale():
        held = jnp.broadcast_to(index > 0, (part,))  # nothing comes before the first block
        before = jnp.maximum(index - 1, 0)

        def total(some):
            added = pltriton.load(stack_ref.at[before, batch, token, some], mask=held, other=0.0)
            return (pltriton.load(tokens_ref.at[batch, token, some]) + added).astype(added.dtype)

        return tuple(total(some) for some in columns)

    merged = lax.cond(slot >= 0, fresh, stale)
    for some, values in zip(columns, merged, strict=True):
        pltriton.store(merged_ref.at[batch, token, some], values)
    # The statistics are of the rounded tokens, as they are where they are read back.
    wide = [values.astype(jnp.float32) for values in merged]
    mean = functools.reduce(jnp.add, wide).sum() / width
    wide = [values - mean for values in wide]
    squares = functools.reduce(jnp.add, [values * values for values in wide])
    factor = lax.rsqrt(squares.sum() / width + eps)
    for some, values in zip(columns, wide, strict=True):
        scale = pltriton.load(scale_ref.at[batch, 0, some])
        shift = pltriton.load(shift_ref.at[batch, 0, some])
        normed = values * factor * (1 + scale) + shift
        pltriton.store(normed_ref.at[batch, token, some], normed.astype(normed_ref.dtype))
