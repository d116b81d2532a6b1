"""Tokens enter a block in one pass over memory: merged, normed and modulated. Pallas Triton.

A program takes a token. Where it is fresh it reads the row that left the block before, and writes
it normed to two places, among all tokens and among the rows; what the cache is to keep of it goes
there. Where it is stale it reads what entered that block and what is cached of it, and writes their
sum, plain and normed.

ptxas 13.0 for sm_90 (jax 0.11.2): 72 registers for width 1536, 64 for 5120; no spills.
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
    kept: Float[Array, "B K H"],
    slots: Int[Array, "B M"],
    stack: Float[Array, "L B N H"],
    index: Int[Array, ""],
    scale: Float[Array, "B 1 H"],
    shift: Float[Array, "B 1 H"],
    *,
    eps: float,
    interpret: bool = False,
) -> tuple[
    Float[Array, "L B N H"], Float[Array, "B N H"], Float[Array, "B N H"], Float[Array, "B K H"]
]:
    """The tokens that enter a block, and what its self-attention reads of them.

    The whole cache is an operand, and no slice of it: that would be copied. It and the tokens are
    written in place.

    Args:
      tokens: that entered the block before, or that enter this one where it is the first; of fresh
        tokens they are not looked at.
      rows: fresh rows that left the block before, in the dtype of `tokens`.
      kept: what it added to them.
      slots: which of the rows is a token's, negative for a stale one; behind those of the tokens,
        rows that are no token's and yet to be normed.
      stack: what each block added to each token when it was last computed.
      index: of the block that is entered.
      scale: float32, added to one.
      shift: float32.
      eps: of the norm.
      interpret: run on a CPU.

    Returns:
      stack: with `kept` in the places of the block before, if there is one.
      merged: tokens plus what the block before had added, where they are stale, else as given.
      normed: of all tokens, normed to mean 0 and variance 1, scaled and shifted; in the same dtype.
      normed_rows: the same of `rows`; those that `slots` does not name hold anything.
    """
    width = tokens.shape[-1]
    part = part_width(width)
    assert part is not None, width
    warps = pl.next_power_of_2(pl.cdiv(width, WARP))
    cache, whole, some = (
        jax.ShapeDtypeStruct(each.shape, each.dtype) for each in (stack, tokens, rows)
    )
    return pl.pallas_call(
        functools.partial(_program, part=part, eps=eps),
        out_shape=(cache, whole, whole, some),
        grid=slots.shape[::-1],
        # Else the loop over blocks copies what leaves back to where it entered.
        input_output_aliases={4: 0, 0: 1},
        compiler_params=pltriton.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name="enter_block",
    )(tokens, rows, kept, slots, stack, index[None], scale, shift)


def _program(
    tokens_ref, rows_ref, kept_ref, slots_ref, stack_ref, index_ref, scale_ref, shift_ref,
    cache_ref, merged_ref, normed_ref, normed_rows_ref, *, part, eps,
):  # fmt: skip
    """One token, or a row that is none's."""
    token, batch = pl.program_id(0), pl.program_id(1)
    _, num_tokens, width = tokens_ref.shape
    columns = [first + jnp.arange(part, dtype=jnp.int32) for first in range(0, width, part)]
    slot, index = slots_ref[batch, token], index_ref[0]
    before = jnp.maximum(index - 1, 0), batch
    everywhere = functools.partial(jnp.broadcast_to, shape=(part,))
    is_token, is_fresh = everywhere(token < num_tokens), everywhere(slot >= 0)
    is_cached = is_token & everywhere(index > 0)  # nothing comes before the first block

    def fresh():
        return tuple(pltriton.load(rows_ref.at[batch, slot, some]) for some in columns)

    def stale():
        def total(some):
            added = pltriton.load(stack_ref.at[*before, token, some], mask=is_cached, other=0.0)
            return (pltriton.load(tokens_ref.at[batch, token, some]) + added).astype(added.dtype)

        return tuple(total(some) for some in columns)

    is_kept = is_fresh & is_cached
    places = [kept_ref.at[batch, jnp.maximum(slot, 0), some] for some in columns]
    kept = [pltriton.load(place, mask=is_kept, other=0.0) for place in places]
    merged = lax.cond(slot >= 0, fresh, stale)
    for some, values in zip(columns, merged, strict=True):
        pltriton.store(merged_ref.at[batch, token, some], values, mask=~is_fresh)
    for some, values in zip(columns, kept, strict=True):
        pltriton.store(cache_ref.at[*before, token, some], values, mask=is_kept)
    # The statistics are of the rounded tokens, as they are where they are read back.
    wide = [values.astype(jnp.float32) for values in merged]
    mean = functools.reduce(jnp.add, wide).sum() / width
    wide = [values - mean for values in wide]
    squares = functools.reduce(jnp.add, [values * values for values in wide])
    factor = lax.rsqrt(squares.sum() / width + eps)
    for some, values in zip(columns, wide, strict=True):
        scale = pltriton.load(scale_ref.at[batch, 0, some])
        shift = pltriton.load(shift_ref.at[batch, 0, some])
        normed = (values * factor * (1 + scale) + shift).astype(normed_ref.dtype)
        pltriton.store(normed_ref.at[batch, token, some], normed, mask=is_token)
        row = normed_rows_ref.at[batch, jnp.maximum(slot, 0), some]
        pltriton.store(row, normed, mask=is_fresh)
