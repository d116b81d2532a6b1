"""Shared memory of the Hopper kernel: heads in pieces of their channels."""

import math
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from astraea_jax.kernels.hopper_tiling import BLOCK_Q, Tiling


class Piece(NamedTuple):
    """Some channels of rows, in shared memory: as many as a swizzled row has, 128 bytes at most.

    The two views are of the same bytes. wgmma wants to be told of tiles of eight rows; a copy that
    is told of them takes none but whole tiles, while one of plain rows ends where the rows end and,
    in a head that is narrower, where the channels end: zeros come in, and nothing goes out.

    Attributes:
      first: the first of the channels.
      size: how many.
      tiles: as wgmma reads them, and registers are stored.
      rows: as they are copied from and to global memory.
    """

    first: int
    size: int
    tiles: Any
    rows: Any

    def of(self, rows):
        """The piece's channels of `rows` in global memory, [row, channel]."""
        first = self.first
        if first + self.size > rows.shape[1]:
            # JAX refuses a slice that it knows to go past the end.
            first += lax.axis_index("warpgroup") * 0
        return rows.at[:, pl.ds(first, self.size)]


def runs(tiling: Tiling, dtype) -> list[tuple[int, int]]:
    """How the channels are cut into pieces: [(first, channels)]."""
    if tiling.whole:
        return [(0, tiling.width)]
    found, first = [], 0
    while first < tiling.width:
        left = (tiling.width - first) * jnp.dtype(dtype).itemsize
        size = next(n for n in (128, 64, 32) if n <= left) // jnp.dtype(dtype).itemsize
        found.append((first, size))
        first += size
    return found


def scratch_types(dtype, tiling: Tiling, *, partial: bool, interpret: bool) -> dict[str, Any]:
    """Shared memory and barriers of a program, by the names that `program` knows them by.

    Args:
      dtype: of queries, keys and values.
      tiling: how the work is cut.
      partial: whether the output is that of a part of the keys, in float32, with rows of its own;
        otherwise it takes the place of the queries.
      interpret: whether the interpreter runs it, which has no two views of the same bytes.
    """
    compute, stages = tiling.warpgroups, tiling.stages
    queries, keys = (compute, BLOCK_Q), (stages, tiling.block_kv)

    def pieces(shape, dtype=dtype):
        return [
            _union((*shape, size), dtype, one_view=interpret or tiling.whole)
            for _, size in runs(tiling, dtype)
        ]

    copies = len(runs(tiling, dtype))
    scratch = dict(
        q_smem=pieces(queries),
        k_smem=pieces(keys),
        v_smem=pieces(keys),
        lse_smem=plgpu.SMEM(queries, jnp.float32),
        q_ready=plgpu.Barrier(num_arrivals=copies, num_barriers=compute),
        k_ready=plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        v_ready=plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        k_used=plgpu.Barrier(num_arrivals=compute, num_barriers=stages),
        v_used=plgpu.Barrier(num_arrivals=compute, num_barriers=stages),
    )
    if tiling.in_turns:
        scratch["turn"] = plgpu.Barrier(num_arrivals=compute)
    if partial:
        scratch["out_smem"] = pieces(queries, jnp.float32)
    return scratch


def with_views(
    scratch: dict[str, Any], dtype, tiling: Tiling, *, interpret: bool
) -> dict[str, Any]:
    """What a program gets for `scratch_types`, with `Piece`s in the place of their memory."""

    def pieces(refs, dtype=dtype):
        both = [(ref, ref) if interpret or tiling.whole else ref for ref in refs]
        return [Piece(*run, *views) for run, views in zip(runs(tiling, dtype), both, strict=True)]

    found = {name: pieces(scratch[name]) for name in ("q_smem", "k_smem", "v_smem")}
    if "out_smem" in scratch:
        found["out_smem"] = pieces(scratch["out_smem"], jnp.float32)
    return scratch | found


def load(source, pieces: list[Piece], place, ready) -> None:
    """Starts to copy rows of global memory, [row, channel], to a place in the pieces."""
    for piece in pieces:
        plgpu.copy_gmem_to_smem(piece.of(source), piece.rows.at[place], ready.at[place])


def store(pieces: list[Piece], place, target) -> None:
    """Starts to copy the rows at a place in the pieces to global memory."""
    for piece in pieces:
        plgpu.copy_smem_to_gmem(piece.rows.at[place], piece.of(target))


def _union(shape, dtype, *, one_view: bool):
    """Memory of a piece, with both of its views unless one will do; `shape` ends with channels."""
    itemsize = jnp.dtype(dtype).itemsize
    bytes_ = math.gcd(shape[-1] * itemsize, 128)
    swizzle = plgpu.SwizzleTransform(bytes_)  # pyright: ignore[reportAbstractUsage]
    tiles = plgpu.TilingTransform((8, bytes_ // itemsize))  # pyright: ignore[reportAbstractUsage]
    tiled = plgpu.SMEM(shape, dtype, transforms=(tiles, swizzle))
    if one_view:
        return tiled
    return plgpu.RefUnion(tiled, plgpu.SMEM(shape, dtype, transforms=(swizzle,)))
