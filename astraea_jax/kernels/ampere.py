"""Query-only attention for Ampere, Ada and, where it must be, Hopper: Pallas Triton.

Queries may be given as all tokens and indices: their rows are then gathered by the kernel itself.

What `notebooks/studies/compile_report.py` says of the shipped tilings (jax 0.12.0.1, ptxas
13.5): block_q x block_kv, warps, stages; registers; bytes of shared memory. No tiling spills.

    keys   C    sm_80                                  sm_90
      15   64   16 x 16, 1, 1    65     3072           16 x 16, 1, 1    65     3072
      15   72   16 x 16, 1, 1    78     3584           16 x 16, 1, 1    76     3584
      15   96   16 x 16, 1, 1    87     4096           16 x 16, 1, 1    90     4096
      15  128   16 x 16, 1, 1   104     6144           16 x 16, 1, 1   100     6144
      30   64   32 x 32, 2, 1    80     6144           32 x 32, 2, 1    72     6144
      30   72   32 x 32, 2, 1    80     6144           32 x 32, 2, 1    80     6144
      30   96   32 x 32, 2, 1    96     7168           32 x 32, 2, 1   106     7168
      30  128   32 x 32, 2, 1   128    12288           32 x 32, 2, 1   135    12288
    more   64   128 x 64, 8, 2  178    16384           128 x 64, 8, 3  150    65536
    more   72   128 x 64, 8, 2  194    20480           128 x 64, 8, 3  153    81920
    more   96   128 x 64, 8, 2  239    24576           128 x 64, 8, 3  158    98304
    more  128   128 x 32, 8, 3  240    32768           128 x 64, 8, 3  167   131072
"""

import dataclasses
import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.triton as pltriton
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from astraea_jax.kernels import splits as split
from astraea_jax.kernels import tilings
from astraea_jax.kernels.machine import gpu
from astraea_jax.kernels.machine import refusal as refusal

LOG2_E = math.log2(math.e)
MOST_NUMBERS = 2**31 - 1  # offsets are int32


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the work is cut.

    Attributes:
      block_q: queries of a program, a power of two of at least 16.
      block_kv: keys of a tile, a power of two of at least 16.
      warps: of a program.
      stages: tiles of keys and values in flight.
    """

    block_q: int
    block_kv: int
    warps: int
    stages: int


def candidates(width: int, num_queries: int, num_keys: int) -> list[Tiling]:
    """Tilings worth timing; those that don't fit are refused when compiled."""
    del width
    return [
        Tiling(block_q, block_kv, warps, stages)
        for block_q in (16, 32, 64, 128)
        for block_kv in (16, 32, 64, 128)
        for warps in (1, 2, 4, 8)
        for stages in (1, 2, 3)
        if block_q < 2 * max(num_queries, 16)
        and block_kv < 2 * max(num_keys, 16)
        and (num_queries <= 64 or block_q >= 64)
        and (num_keys <= 64 or block_kv >= 32)
        and 8 <= block_q // warps <= 32
        and (stages > 1 or block_kv >= num_keys)
    ]


def attend(
    q: Float[Array, "B M A C"],
    k: Float[Array, "B N A C"],
    v: Float[Array, "B N A C"],
    count: Int[Array, "B"] | None,
    indices: Int[Array, "B K"] | None = None,
    *,
    scale: float,
    tiling: Tiling | None = None,
    splits: int | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B _ A C"], Float[Array, "B A _"]]:
    """See `astraea_jax.attention.query_sparse_attention`.

    Args:
      q: selected queries, or those of all tokens.
      k: keys.
      v: values.
      count: rows in use.
      indices: which queries to take; None means `q` as it is.
      scale: factor on the logits.
      tiling: None means by the table.
      splits: parts of the keys that go to programs of their own; None means as many as fill a chip.
      interpret: run on a CPU.
    """
    batch, num_keys, heads, width = k.shape
    num_queries = q.shape[1] if indices is None else indices.shape[1]
    here = gpu()
    if tiling is None:
        version = here.version if here else "any"
        tiling = Tiling(**tilings.find("triton", version, width, num_queries, num_keys))
    num_tiles = pl.cdiv(num_queries, tiling.block_q)
    if splits is None:
        processors = here.processors if here else 1
        num_kv_tiles = pl.cdiv(num_keys, tiling.block_kv)
        splits = split.num_splits(batch * heads * num_tiles, num_kv_tiles, processors)
    if count is None:
        count = jnp.full((batch,), num_queries, jnp.int32)
    operands = (q, k, v, count.astype(jnp.int32))
    if indices is not None:
        operands += (jnp.clip(indices, 0, q.shape[1] - 1).astype(jnp.int32),)
    out_dtype = v.dtype if splits == 1 else jnp.float32
    outs, lses = pl.pallas_call(
        functools.partial(_program, scale=scale * LOG2_E, tiling=tiling, num_queries=num_queries),
        out_shape=(
            jax.ShapeDtypeStruct((splits, batch, num_queries, heads, width), out_dtype),
            jax.ShapeDtypeStruct((splits, batch, heads, num_queries), jnp.float32),
        ),
        grid=(num_tiles * splits, heads, batch),
        compiler_params=pltriton.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpret,
        name="query_sparse_attention",
    )(*operands)
    if splits == 1:
        return outs[0], lses[0]
    out, lse = split.merge(outs, lses)
    return out.astype(v.dtype), lse


def pieces(width: int) -> list[tuple[int, int]]:
    """Powers of two, at least 16, that cover a head: [(first channel, channels)]; 72 is 64 + 16."""
    found, first = [], 0
    while first < width:
        size = max(16, 1 << ((width - first).bit_length() - 1))
        found.append((first, size))
        first += size
    return found


def _program(q_ref, k_ref, v_ref, count_ref, *refs, scale, tiling, num_queries):
    """One tile of queries of one head against one part of the keys."""
    *index_ref, out_ref, lse_ref = refs
    splits, width, block_q = out_ref.shape[0], k_ref.shape[3], tiling.block_q
    tile, head, batch = (pl.program_id(axis) for axis in range(3))
    part, tile = lax.rem(tile, splits), lax.div(tile, splits)
    rows = tile * block_q + jnp.arange(block_q, dtype=jnp.int32)
    count = count_ref[batch]
    used = rows < jnp.minimum(count, num_queries)
    channels = pieces(width)

    def compute():
        source = rows
        if index_ref:
            source = pltriton.load(index_ref[0].at[batch, rows], mask=used, other=0)
        q = [_load(q_ref, (batch, head), source, piece, used) for piece in channels]
        steps = pl.cdiv(k_ref.shape[1], tiling.block_kv)
        span = lax.div(part * steps, splits), lax.div((part + 1) * steps, splits)
        totals, normaliser, largest = _attend_tiles(
            q, k_ref, v_ref, (batch, head), span, scale, tiling.block_kv
        )
        outs = tuple(jnp.where(used[:, None], x / normaliser[:, None], 0.0) for x in totals)
        lse = (largest + jnp.log2(normaliser)) * (1 / LOG2_E)
        return outs, jnp.where(used, lse, -jnp.inf)

    def nothing():
        outs = tuple(jnp.zeros((block_q, size), jnp.float32) for _, size in channels)
        return outs, jnp.full((block_q,), -jnp.inf, jnp.float32)

    outs, lse = lax.cond(tile * block_q < count, compute, nothing)
    pltriton.store(lse_ref.at[part, batch, head, rows], lse, mask=rows < num_queries)
    for out, (first, size) in zip(outs, channels, strict=True):
        columns = first + jnp.arange(size, dtype=jnp.int32)
        pltriton.store(
            out_ref.at[part, batch, rows[:, None], head, columns[None, :]],
            out.astype(out_ref.dtype),
            mask=(rows < num_queries)[:, None] & (columns < width)[None, :],
        )


def _attend_tiles(q, k_ref, v_ref, place, span, scale, block_kv):
    """Unnormalised attention of q, in pieces, to a span of tiles of keys."""
    num_keys, block_q = k_ref.shape[1], q[0].shape[0]
    channels = pieces(k_ref.shape[3])

    def add_tile(tile, carry, masked=False):
        totals, normaliser, largest = carry
        keys = tile * block_kv + jnp.arange(block_kv, dtype=jnp.int32)
        inside = keys < num_keys if masked else None
        scores = jnp.zeros((block_q, block_kv), jnp.float32)
        for rows, piece in zip(q, channels, strict=True):
            scores += pltriton.dot(rows, _load(k_ref, place, keys, piece, inside).T)
        # Everything is in base 2, so that a weight is one multiply-add and one ex2.
        scores *= scale
        if inside is not None:
            scores = jnp.where(inside[None, :], scores, -jnp.inf)
        new_largest = jnp.maximum(largest, scores.max(axis=1))
        keep = jnp.exp2(largest - new_largest)
        weights = jnp.exp2(scores - new_largest[:, None])
        normaliser = normaliser * keep + weights.sum(axis=1)
        weights = weights.astype(v_ref.dtype)
        totals = tuple(
            total * keep[:, None] + pltriton.dot(weights, _load(v_ref, place, keys, piece, inside))
            for total, piece in zip(totals, channels, strict=True)
        )
        return totals, normaliser, new_largest

    carry = (
        tuple(jnp.zeros((block_q, size), jnp.float32) for _, size in channels),
        jnp.zeros((block_q,), jnp.float32),
        jnp.full((block_q,), -jnp.inf, jnp.float32),
    )
    first, last = span
    full = num_keys // block_kv
    carry = lax.fori_loop(first, jnp.minimum(last, full), add_tile, carry)
    if num_keys % block_kv:
        masked = functools.partial(add_tile, masked=True)
        carry = lax.fori_loop(jnp.maximum(first, full), last, masked, carry)
    return carry


def _load(ref, place, rows, piece, inside):
    """Some channels of some rows of a head; zeros where `inside` (None: everywhere) is false."""
    (batch, head), (first, size) = place, piece
    columns = first + jnp.arange(size, dtype=jnp.int32)
    mask = None if inside is None else jnp.broadcast_to(inside[:, None], (rows.shape[0], size))
    if first + size > ref.shape[3]:
        narrow = jnp.broadcast_to((columns < ref.shape[3])[None, :], (rows.shape[0], size))
        mask = narrow if mask is None else mask & narrow
    source = ref.at[batch, rows[:, None], head, columns[None, :]]
    return pltriton.load(source, mask=mask, other=None if mask is None else 0.0)
