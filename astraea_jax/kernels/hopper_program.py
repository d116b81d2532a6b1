"""What a program of the Hopper kernel does: two warpgroups compute, one loads."""

import math

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from astraea_jax.kernels.hopper_compute import Item, Tiles, Warpgroup, attend_tiles, copy_pieces
from astraea_jax.kernels.hopper_tiling import BLOCK_Q, Tiling


def _shared(shape, dtype):
    """Shared memory as wgmma reads it and TMA writes it; `shape` ends with (rows, channels)."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = _swizzle(shape[-1], itemsize)
    tiling = plgpu.TilingTransform((8, swizzle // itemsize))  # pyright: ignore[reportAbstractUsage]
    transforms = (tiling, plgpu.SwizzleTransform(swizzle))  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _pieces(shape, dtype, tiling: Tiling, interpret: bool):
    """The same for each piece of the channels."""
    if not tiling.slabs:
        return [_shared((*shape, tiling.width), dtype)]
    found = []
    for _, size in tiling.pieces:
        whole = (*shape, size)
        tiled = _shared(whole, dtype)
        if interpret:
            found.append(tiled)
            continue
        swizzle = plgpu.SwizzleTransform(2 * size)  # pyright: ignore[reportAbstractUsage]
        found.append(plgpu.RefUnion(tiled, plgpu.SMEM(whole, dtype, transforms=(swizzle,))))
    return found


def _swizzle(width: int, itemsize: int) -> int:
    """The longest run of bytes that swizzled rows of this width are made of."""
    return math.gcd(width * itemsize, 128)


def scratch_types(dtype, tiling: Tiling, out=None, interpret=False) -> dict:
    """Shared memory and barriers of a program, by the names that `program` knows them by.

    Args:
      dtype: of queries, keys and values.
      tiling: how the work is cut.
      out: width and dtype of the output, if it needs rows of its own; otherwise it takes the place
        of the queries.
      interpret: whether the interpreter runs it.
    """
    compute, pieces = tiling.warpgroups, len(tiling.pieces)
    keys = (tiling.stages, tiling.block_kv)
    scratch = dict(
        q_smem=_pieces((compute, BLOCK_Q), dtype, tiling, interpret),
        k_smem=_pieces(keys, dtype, tiling, interpret),
        v_smem=_pieces(keys, dtype, tiling, interpret),
        lse_smem=plgpu.SMEM((compute, BLOCK_Q), jnp.float32),
        q_ready=plgpu.Barrier(num_arrivals=pieces, num_barriers=compute),
        k_ready=plgpu.Barrier(num_arrivals=pieces, num_barriers=tiling.stages),
        v_ready=plgpu.Barrier(num_arrivals=pieces, num_barriers=tiling.stages),
        k_used=plgpu.Barrier(num_arrivals=compute, num_barriers=tiling.stages),
        v_used=plgpu.Barrier(num_arrivals=compute, num_barriers=tiling.stages),
    )
    if tiling.turns == "softmax":
        scratch["turn"] = plgpu.Barrier(num_arrivals=compute)
    if tiling.turns == "products":
        scratch["turn"] = plgpu.Barrier(num_barriers=compute)
    if out is not None:
        shape = (compute, BLOCK_Q, out[0])
        scratch["out_smem"] = plgpu.SMEM(shape, out[1]) if out[0] % 16 else _shared(shape, out[1])
    return scratch


def program(
    q_ref, k_ref, v_ref, count_ref, out_ref, lse_ref, *,
    scale, num_keys, splits, num_items, num_programs, tiling, interpret, **scratch,
):  # fmt: skip
    """A program: every so many items of work, one after another."""
    if tiling.slabs and not interpret:
        for name in ("q_smem", "k_smem", "v_smem"):
            scratch[name] = [tuple(ref) for ref in scratch[name]]
    first_item, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
    num_batch, heads = k_ref.shape[0], k_ref.shape[2]
    tiles_a_head = num_items // (num_batch * heads)
    num_kv_tiles = pl.cdiv(num_keys, tiling.block_kv)

    def find(index, before) -> tuple[Item, Tiles]:
        tile, rest = lax.rem(index, tiles_a_head), lax.div(index, tiles_a_head)
        batch, head = lax.div(rest, heads), lax.rem(rest, heads)
        first, last, target = 0, num_kv_tiles, batch
        if splits > 1:
            part, tile = lax.rem(tile, splits), lax.div(tile, splits)
            first = lax.div(part * num_kv_tiles, splits)
            last = lax.div((part + 1) * num_kv_tiles, splits)
            target = part * num_batch + batch
        item = Item(batch, head, target, tile * tiling.rows, count_ref[batch])
        return item, Tiles(first, last, before, num_keys, tiling)

    def for_each_item(work):
        """Does `work(item, tiles)`, which skips the keys of what is not live; tiles not skipped."""

        def one(turn, before):
            item, tiles = find(first_item + turn * num_programs, before)
            work(item, tiles)
            return before + jnp.where(item.live, tiles.last - tiles.first, 0)

        if num_programs == num_items:  # without the loop it takes fewer registers
            item, tiles = find(first_item, 0)
            work(item, tiles)
            return jnp.where(item.live, tiles.last - tiles.first, 0)
        turns = lax.div(num_items - first_item + num_programs - 1, num_programs)
        return lax.fori_loop(0, turns, one, jnp.int32(0))

    @pl.when(warpgroup < tiling.warpgroups)
    def _compute_warpgroup():
        plgpu.set_max_registers(tiling.registers[0], action="increase")

        def work(item, tiles):
            worker = Warpgroup(warpgroup, item, tiles, scale, interpret, scratch, v_ref.dtype)

            @pl.when(item.live)
            def _():
                worker.load_queries(q_ref)
                worker.write(*attend_tiles(worker), out_ref, lse_ref)

            @pl.when(jnp.logical_not(item.live))
            def _():
                total, *_, nothing = worker.start()
                worker.write(total, nothing, out_ref, lse_ref)

        for_each_item(work)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == tiling.warpgroups)
    def _memory_warpgroup():
        plgpu.set_max_registers(tiling.registers[1], action="decrease")
        load = lambda item, tiles: _load_tiles(k_ref, v_ref, item, tiles, scratch, interpret)  # noqa: E731
        loaded = for_each_item(load)

        def drain(tile, _):  # no barrier may be left with an arrival that nobody has seen
            for name in ("k_used", "v_used"):
                plgpu.barrier_wait(scratch[name].at[lax.rem(tile, jnp.int32(tiling.stages))])

        lax.fori_loop(jnp.maximum(loaded - tiling.stages, 0), loaded, drain, None)


def _load_tiles(k_ref, v_ref, item: Item, tiles: Tiles, scratch, interpret) -> None:
    """What the memory warpgroup does for an item: keeps the buffers of keys and values full."""
    streams = [
        (ref, *(scratch[f"{name}_{part}"] for part in ("smem", "ready", "used")))
        for name, ref in (("k", k_ref), ("v", v_ref))
    ]

    def load(tile, _):
        slot = tiles.slot(tile)
        keys = pl.ds(tile * tiles.tiling.block_kv, tiles.tiling.block_kv)
        for source, target, ready, used in streams:

            @pl.when(tiles.before + tile - tiles.first >= tiles.tiling.stages)
            def _(used=used):
                plgpu.barrier_wait(used.at[slot])

            copy_pieces(
                source.at[item.batch, keys, item.head], target, slot, ready, tiles.tiling, interpret
            )

    @pl.when(item.live)
    def _():
        lax.fori_loop(tiles.first, tiles.last, load, None)
