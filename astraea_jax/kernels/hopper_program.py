"""What one program of the Hopper kernel does: two warpgroups compute, one loads."""

import functools
import math
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from astraea_jax.kernels.hopper_tiling import BLOCK_Q, COMPUTE, LOG2_E, MEMORY, ROWS, Tiling

ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)


def _shared(shape, dtype):
    """Shared memory as wgmma reads it and TMA writes it; `shape` ends with (rows, channels)."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = _swizzle(shape[-1], itemsize)
    tiling = plgpu.TilingTransform((8, swizzle // itemsize))  # pyright: ignore[reportAbstractUsage]
    transforms = (tiling, plgpu.SwizzleTransform(swizzle))  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _swizzle(width: int, itemsize: int) -> int:
    """The longest run of bytes that swizzled rows of this width are made of."""
    return math.gcd(width * itemsize, 128)


def scratch_types(dtype, tiling: Tiling, out=None) -> dict:
    """Shared memory and barriers of a program, by the names that `program` knows them by.

    Args:
      dtype: of queries, keys and values.
      tiling: how the work is cut.
      out: width and dtype of the output, if it needs rows of its own; otherwise it takes the place
        of the queries.
    """
    keys = (tiling.stages, tiling.block_kv, tiling.width)
    queries = (COMPUTE, BLOCK_Q, tiling.width)
    scratch = dict(
        q_smem=_shared(queries, dtype),
        k_smem=_shared(keys, dtype),
        v_smem=_shared(keys, dtype),
        lse_smem=plgpu.SMEM((COMPUTE, BLOCK_Q), jnp.float32),
        q_ready=plgpu.Barrier(num_barriers=COMPUTE),
        k_ready=plgpu.Barrier(num_barriers=tiling.stages),
        v_ready=plgpu.Barrier(num_barriers=tiling.stages),
        k_used=plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=tiling.stages),
        v_used=plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=tiling.stages),
        turn=plgpu.Barrier(num_arrivals=COMPUTE),
    )
    if out is not None:
        shape = (COMPUTE, BLOCK_Q, out[0])
        scratch["out_smem"] = plgpu.SMEM(shape, out[1]) if out[0] % 16 else _shared(shape, out[1])
    return scratch


class Tiles(NamedTuple):
    """The tiles of keys that a program goes through.

    Attributes:
      first: the first one; traced where the keys are split.
      last: one past the last one.
      num_keys: keys of the whole, without padding.
      tiling: how the work is cut.
    """

    first: Any
    last: Any
    num_keys: int
    tiling: Tiling

    def slot(self, tile):
        """Where a tile stands in shared memory."""
        return lax.rem(tile - self.first, jnp.int32(self.tiling.stages))


def program(
    q_ref, k_ref, v_ref, count_ref, out_ref, lse_ref, *,
    scale, num_keys, splits, tiling, interpret, **scratch,
):  # fmt: skip
    """One tile of queries of one head against one part of the keys."""
    batch, head, tile = (lax.axis_index(name) for name in ("batch", "heads", "tiles"))
    warpgroup = lax.axis_index("warpgroup")
    first_row, first, last, target = (
        tile * ROWS,
        0,
        pl.cdiv(num_keys, tiling.block_kv),
        batch,
    )
    if splits > 1:
        part, first_row = lax.rem(tile, splits), lax.div(tile, splits) * ROWS
        first, last = lax.div(part * last, splits), lax.div((part + 1) * last, splits)
        target = part * k_ref.shape[0] + batch
    tiles = Tiles(first, last, num_keys, tiling)
    count = count_ref[batch]
    live = first_row < count
    mine = first_row + warpgroup * BLOCK_Q
    rows = pl.ds(mine, BLOCK_Q)

    def write(out, lse):
        out_tile = scratch.get("out_smem", scratch["q_smem"]).at[warpgroup]
        lse_tile = scratch["lse_smem"].at[warpgroup]
        out_tile[...] = out[:, : out_ref.shape[-1]].astype(out_tile.dtype)
        lse_tile[...] = lse
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_tile, out_ref.at[target, rows, head])
        plgpu.copy_smem_to_gmem(lse_tile, lse_ref.at[target, head, rows])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(jnp.logical_and(warpgroup < COMPUTE, live))
    def _compute_warpgroup():
        plgpu.set_max_registers(232, action="increase")
        q_tile, ready = scratch["q_smem"].at[warpgroup], scratch["q_ready"].at[warpgroup]
        plgpu.copy_gmem_to_smem(q_ref.at[batch, rows, head], q_tile, ready)
        plgpu.barrier_wait(ready)
        total, normaliser, largest = _attend_tiles(
            Warpgroup(warpgroup, q_tile, tiles, scale, interpret, scratch)
        )
        out = total / _over_columns(normaliser, total.shape)
        lse = (largest + jnp.log(normaliser) * LOG2_E) * (1 / LOG2_E)
        row = plgpu.broadcasted_iota(jnp.int32, out.shape, 0, layout=plgpu.Layout.WGMMA)
        out = jnp.where(row < count - mine, out, 0.0)
        row = plgpu.broadcasted_iota(jnp.int32, lse.shape, 0, layout=ROW_LAYOUT)
        write(out, jnp.where(row < count - mine, lse, -jnp.inf))

    @pl.when(jnp.logical_and(warpgroup < COMPUTE, jnp.logical_not(live)))
    def _dead_tile():
        out = _filled((BLOCK_Q, tiling.width), 0, plgpu.Layout.WGMMA)
        write(out, _filled((BLOCK_Q,), -jnp.inf, ROW_LAYOUT))

    @pl.when(jnp.logical_and(warpgroup == MEMORY, live))
    def _memory_warpgroup():
        plgpu.set_max_registers(40, action="decrease")
        _load_tiles(k_ref, v_ref, (batch, head), tiles, scratch)


class Warpgroup(NamedTuple):
    """What a compute warpgroup works with.

    Attributes:
      index: 0 or 1.
      q_tile: its queries, in shared memory.
      tiles: the tiles of keys.
      scale: factor on the logits, times log2(e).
      interpret: whether the interpreter runs it. It knows no accumulator that outlives a scope, nor
        wgmma from registers: values are then multiplied by a plain product.
      scratch: shared memory and barriers.
    """

    index: Any
    q_tile: Any
    tiles: Tiles
    scale: float
    interpret: bool
    scratch: dict

    def take_turn(self) -> None:
        """Hands the tensor cores to the other warpgroup, or takes them back."""
        plgpu.barrier_arrive(self.scratch["turn"])
        plgpu.barrier_wait(self.scratch["turn"])

    def scores(self, slot):
        """Products of the queries with a tile of keys."""

        def products(scores_ref):
            plgpu.wgmma(scores_ref, self.q_tile, self.scratch["k_smem"].at[slot].T)
            self.take_turn()
            return scores_ref[...]

        shape = (BLOCK_Q, self.tiles.tiling.block_kv)
        scores = pl.run_scoped(products, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
        plgpu.barrier_arrive(self.scratch["k_used"].at[slot])
        return scores

    def softmax(self, tile, scores, normaliser, largest, masked: bool):
        """Weights of a tile, the running normaliser and maximum, and what to keep of the total.

        Everything is in base 2, so that a weight is one multiply-add and one ex2.
        """
        if masked:
            key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
            inside = key < self.tiles.num_keys - tile * self.tiles.tiling.block_kv
            scores = jnp.where(inside, scores, -jnp.inf)
        new_largest = jnp.maximum(largest, scores.max(axis=1) * self.scale)
        keep = jnp.exp2(largest - new_largest)
        weights = jnp.exp2(scores * self.scale - _over_columns(new_largest, scores.shape))
        normaliser = normaliser * keep + weights.sum(axis=1)
        return weights.astype(self.scratch["v_smem"].dtype), normaliser, new_largest, keep

    def add_values(self, total, weights, slot, meanwhile) -> Any:
        """The total with the values of a tile, by their weights."""
        v_tile = self.scratch["v_smem"].at[slot]
        if self.interpret:
            total += jnp.dot(weights, v_tile[...], preferred_element_type=jnp.float32)
            plgpu.commit_smem()  # a plain read is fenced off from the copy that overwrites it
            meanwhile()
        else:

            def add(total_ref):
                plgpu.wgmma(total_ref, weights, v_tile)
                meanwhile()

            total = pl.run_state(add)(plgpu.WGMMAAccumulatorRef.init(total))
        plgpu.barrier_arrive(self.scratch["v_used"].at[slot])
        return total

    def loop(self, add_tile, first, carry):
        """Folds the tiles from `first` on into `carry`; only the last of all may need a mask."""
        full, rest = divmod(self.tiles.num_keys, self.tiles.tiling.block_kv)
        last = self.tiles.last
        carry = lax.fori_loop(first, jnp.minimum(last, full), add_tile, carry)
        if rest:
            masked = functools.partial(add_tile, masked=True)
            carry = lax.fori_loop(jnp.maximum(first, full), last, masked, carry)
        return carry

    def start(self):
        """A total, its normaliser and its maximum before any tile."""
        return (
            _filled((BLOCK_Q, self.tiles.tiling.width), 0, plgpu.Layout.WGMMA),
            _filled((BLOCK_Q,), 0, ROW_LAYOUT),
            _filled((BLOCK_Q,), -jnp.inf, ROW_LAYOUT),
        )


def _attend_tiles(warpgroup: Warpgroup):
    """Attention to the tiles, one after another: (total, normaliser, largest)."""
    tiles, scratch = warpgroup.tiles, warpgroup.scratch

    def add_tile(tile, carry, masked=False):
        total, normaliser, largest = carry
        slot = tiles.slot(tile)
        scores = warpgroup.scores(slot)
        weights, normaliser, largest, keep = warpgroup.softmax(
            tile, scores, normaliser, largest, masked
        )
        total *= _over_columns(keep, total.shape)
        total, normaliser, largest, weights = lax.optimization_barrier(
            (total, normaliser, largest, weights)
        )
        plgpu.barrier_arrive(scratch["turn"])  # the softmax is done
        plgpu.barrier_wait(scratch["v_ready"].at[slot])
        plgpu.barrier_wait(scratch["turn"])  # the tensor cores are free

        def wait_for_next_keys():
            @pl.when(tile + 1 < tiles.last)
            def _():
                plgpu.barrier_wait(scratch["k_ready"].at[tiles.slot(tile + 1)])

        total = warpgroup.add_values(total, weights, slot, wait_for_next_keys)
        return total, normaliser, largest

    plgpu.barrier_wait(scratch["k_ready"].at[0])
    pl.when(warpgroup.index == 1)(warpgroup.take_turn)
    carry = warpgroup.loop(add_tile, tiles.first, warpgroup.start())
    pl.when(warpgroup.index == 0)(warpgroup.take_turn)
    return carry


def _load_tiles(k_ref, v_ref, place, tiles: Tiles, scratch) -> None:
    """What the memory warpgroup does: keeps the buffers of keys and values full."""
    batch, head = place
    streams = [
        (ref, *(scratch[f"{name}_{part}"] for part in ("smem", "ready", "used")))
        for name, ref in (("k", k_ref), ("v", v_ref))
    ]

    def load(tile, _):
        slot = tiles.slot(tile)
        keys = pl.ds(tile * tiles.tiling.block_kv, tiles.tiling.block_kv)
        for source, target, ready, used in streams:

            @pl.when(tile - tiles.first >= tiles.tiling.stages)
            def _(used=used):
                plgpu.barrier_wait(used.at[slot])

            plgpu.copy_gmem_to_smem(source.at[batch, keys, head], target.at[slot], ready.at[slot])

    lax.fori_loop(tiles.first, tiles.last, load, None)

    def drain(tile, _):  # no barrier may be left with an arrival that nobody has seen
        for *_, used in streams:
            plgpu.barrier_wait(used.at[tiles.slot(tile)])

    undrained = jnp.maximum(tiles.last - tiles.tiling.stages, tiles.first)
    lax.fori_loop(undrained, tiles.last, drain, None)


def _filled(shape, value, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _over_columns(rows, shape):
    return lax.broadcast_in_dim(rows, shape, [0])
