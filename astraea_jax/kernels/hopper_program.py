"""What a program of the Hopper kernel does: some warpgroups compute, one loads."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from astraea_jax.kernels import hopper_memory as memory
from astraea_jax.kernels.hopper_compute import Item, Tiles, Warpgroup, attend_tiles


def program(
    q_ref, k_ref, v_ref, count_ref, out_ref, lse_ref, *,
    scale, splits, num_items, num_programs, tiling, interpret, **scratch,
):  # fmt: skip
    """A program: every so many items of work, one after another."""
    scratch = memory.with_views(scratch, q_ref.dtype, tiling, interpret=interpret)
    first_item, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
    num_batch, num_keys, heads, _ = k_ref.shape
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
            worker = Warpgroup(warpgroup, item, tiles, scale, interpret, scratch)

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
        loaded = for_each_item(lambda item, tiles: _load_tiles(k_ref, v_ref, item, tiles, scratch))

        def drain(tile, _):  # no barrier may be left with an arrival that nobody has seen
            for name in ("k_used", "v_used"):
                plgpu.barrier_wait(scratch[name].at[lax.rem(tile, jnp.int32(tiling.stages))])

        lax.fori_loop(jnp.maximum(loaded - tiling.stages, 0), loaded, drain, None)


def _load_tiles(k_ref, v_ref, item: Item, tiles: Tiles, scratch) -> None:
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

            memory.load(source.at[item.batch, keys, item.head], target, slot, ready)

    @pl.when(item.live)
    def _():
        lax.fori_loop(tiles.first, tiles.last, load, None)
