"""What a compute warpgroup of the Hopper kernel does: scores, softmax, values, rows."""

import functools
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from astraea_jax.kernels import hopper_memory as memory
from astraea_jax.kernels.hopper_tiling import BLOCK_Q, LOG2_E, Tiling

ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)


class Tiles(NamedTuple):
    """The tiles of keys that an item of work goes through.

    Attributes:
      first: the first one; traced where the keys are split.
      last: one past the last one.
      before: tiles of the program's earlier items, by which buffers go on in turn.
      num_keys: keys of the whole, without padding.
      tiling: how the work is cut.
    """

    first: Any
    last: Any
    before: Any
    num_keys: int
    tiling: Tiling

    def slot(self, tile):
        """Where a tile stands in shared memory."""
        turn = self.before + tile - self.first
        if isinstance(turn, int):
            return turn % self.tiling.stages
        return lax.rem(turn, jnp.int32(self.tiling.stages))


class Item(NamedTuple):
    """An item of work: a tile of queries of one head against one part of the keys.

    Attributes:
      batch: row of the batch.
      head: head.
      target: row of the output's batch: parts of the keys one after another.
      first_row: the first of its queries.
      count: queries of this row of the batch that are in use.
    """

    batch: Any
    head: Any
    target: Any
    first_row: Any
    count: Any

    @property
    def live(self):
        """Whether any of its queries is in use."""
        return self.first_row < self.count


class Warpgroup(NamedTuple):
    """What a compute warpgroup works with.

    Attributes:
      index: which one.
      item: its work.
      tiles: the tiles of keys.
      scale: factor on the logits, times log2(e).
      interpret: whether the interpreter runs it. It knows no accumulator that outlives a scope, nor
        wgmma from registers: values are then multiplied by a plain product.
      scratch: shared memory and barriers.
    """

    index: Any
    item: Item
    tiles: Tiles
    scale: float
    interpret: bool
    scratch: dict

    @property
    def rows(self):
        """Its queries."""
        return pl.ds(self.item.first_row + self.index * BLOCK_Q, BLOCK_Q)

    def load_queries(self, q_ref) -> None:
        """Loads its queries, and waits for them."""
        if "out_smem" not in self.scratch:  # the last output has been read from their place
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        source = q_ref.at[self.item.batch, self.rows, self.item.head]
        memory.load(source, self.scratch["q_smem"], self.index, self.scratch["q_ready"])
        plgpu.barrier_wait(self.scratch["q_ready"].at[self.index])

    def write(self, out, lse, out_ref, lse_ref) -> None:
        """Starts to write its rows; 0 and -inf for those that are not in use."""
        used = self.item.count - self.item.first_row - self.index * BLOCK_Q
        row = plgpu.broadcasted_iota(jnp.int32, out.shape, 0, layout=plgpu.Layout.WGMMA)
        out = jnp.where(row < used, out, 0.0)
        row = plgpu.broadcasted_iota(jnp.int32, lse.shape, 0, layout=ROW_LAYOUT)
        lse = jnp.where(row < used, lse, -jnp.inf)
        pieces = self.scratch.get("out_smem", self.scratch["q_smem"])
        lse_tile = self.scratch["lse_smem"].at[self.index]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for piece in pieces:
            tile = piece.tiles.at[self.index]
            tile[...] = out[:, piece.first : piece.first + piece.size].astype(tile.dtype)
        lse_tile[...] = lse
        plgpu.commit_smem()
        target, head = self.item.target, self.item.head
        memory.store(pieces, self.index, out_ref.at[target, self.rows, head])
        plgpu.copy_smem_to_gmem(lse_tile, lse_ref.at[target, head, self.rows])

    def arrive(self) -> None:
        """Says that what it does now is done, if warpgroups take turns."""
        if self.tiles.tiling.in_turns:
            plgpu.barrier_arrive(self.scratch["turn"])

    def wait(self) -> None:
        """Waits until the other has said so, if warpgroups take turns."""
        if self.tiles.tiling.in_turns:
            plgpu.barrier_wait(self.scratch["turn"])

    def take_turn(self) -> None:
        """Hands the tensor cores to the other warpgroup, or takes them back."""
        self.arrive()
        self.wait()

    def scores(self, slot):
        """Products of the queries with a tile of keys."""

        def products(scores_ref):
            for q, k in zip(self.scratch["q_smem"], self.scratch["k_smem"], strict=True):
                plgpu.wgmma(scores_ref, q.tiles.at[self.index], k.tiles.at[slot].T)
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
        return weights.astype(self.scratch["v_smem"][0].tiles.dtype), normaliser, new_largest, keep

    def add_values(self, total, weights, slot, meanwhile) -> Any:
        """The total with the values of a tile, by their weights."""
        pieces = self.scratch["v_smem"]
        if self.interpret:
            values = jnp.concatenate([v.tiles.at[slot][...] for v in pieces], axis=1)
            total += jnp.dot(weights, values, preferred_element_type=jnp.float32)
            plgpu.commit_smem()  # a plain read is fenced off from the copy that overwrites it
            meanwhile()
        else:

            def add(total_ref):
                for v in pieces:
                    columns = total_ref.at[:, pl.ds(v.first, v.size)] if pieces[1:] else total_ref
                    plgpu.wgmma(columns, weights, v.tiles.at[slot])
                meanwhile()

            total = pl.run_state(add)(plgpu.WGMMAAccumulatorRef.init(total))
        plgpu.barrier_arrive(self.scratch["v_used"].at[slot])
        return total

    def loop(self, add_tile, carry):
        """Folds the tiles into `carry`; only the last of all may need a mask."""
        full, rest = divmod(self.tiles.num_keys, self.tiles.tiling.block_kv)
        first, last = self.tiles.first, self.tiles.last
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


def attend_tiles(warpgroup: Warpgroup):
    """Attention to the tiles, one after another: (out, lse)."""
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
        warpgroup.arrive()  # the softmax is done
        plgpu.barrier_wait(scratch["v_ready"].at[slot])
        warpgroup.wait()  # the tensor cores are free

        def wait_for_next_keys():
            @pl.when(tile + 1 < tiles.last)
            def _():
                plgpu.barrier_wait(scratch["k_ready"].at[tiles.slot(tile + 1)])

        total = warpgroup.add_values(total, weights, slot, wait_for_next_keys)
        return total, normaliser, largest

    plgpu.barrier_wait(scratch["k_ready"].at[tiles.slot(tiles.first)])
    pl.when(warpgroup.index == 1)(warpgroup.take_turn)
    total, normaliser, largest = warpgroup.loop(add_tile, warpgroup.start())
    pl.when(warpgroup.index == 0)(warpgroup.take_turn)
    out = total / _over_columns(normaliser, total.shape)
    return out, (largest + jnp.log(normaliser) * LOG2_E) * (1 / LOG2_E)


def _filled(shape, value, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _over_columns(rows, shape):
    return lax.broadcast_in_dim(rows, shape, [0])
