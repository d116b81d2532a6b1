"""What a compute warpgroup of the Hopper kernel does: scores, softmax, values, rows."""

import functools
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

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


def tiled(ref):
    """The view that wgmma reads, of a piece."""
    return ref[0] if isinstance(ref, tuple) else ref


def swizzled(ref):
    """The view that copies write and read, of a piece."""
    return ref[1] if isinstance(ref, tuple) else ref


def copy_pieces(source, target, place, ready, tiling: Tiling, interpret):
    """Starts to load rows in pieces of their channels; zeros where there are none."""
    if not tiling.slabs:
        plgpu.copy_gmem_to_smem(source, target[0].at[place], ready.at[place])
        return
    # Channels past the end come as zeros; a slice that is known to reach there JAX would refuse.
    zero = lax.axis_index("warpgroup") * 0
    for piece, (first, size) in zip(target, tiling.pieces, strict=True):
        plgpu.copy_gmem_to_smem(
            source.at[:, pl.ds(first + zero, size)], swizzled(piece).at[place], ready.at[place]
        )


class Warpgroup(NamedTuple):
    """What a compute warpgroup works with.

    Attributes:
      index: 0 or 1.
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
    dtype: Any

    @property
    def rows(self):
        """Its queries."""
        return pl.ds(self.item.first_row + self.index * BLOCK_Q, BLOCK_Q)

    def load_queries(self, q_ref) -> None:
        """Loads its queries, and waits for them."""
        ready = self.scratch["q_ready"].at[self.index]
        source = q_ref.at[self.item.batch, self.rows, self.item.head]
        q_smem, tiling = self.scratch["q_smem"], self.tiles.tiling
        if "out_smem" not in self.scratch:  # the last output has been read from their place
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        copy_pieces(source, q_smem, self.index, self.scratch["q_ready"], tiling, self.interpret)
        plgpu.barrier_wait(ready)

    def write(self, out, lse, out_ref, lse_ref) -> None:
        """Starts to write its rows; 0 and -inf for those that are not in use."""
        used = self.item.count - self.item.first_row - self.index * BLOCK_Q
        row = plgpu.broadcasted_iota(jnp.int32, out.shape, 0, layout=plgpu.Layout.WGMMA)
        out = jnp.where(row < used, out, 0.0)
        row = plgpu.broadcasted_iota(jnp.int32, lse.shape, 0, layout=ROW_LAYOUT)
        lse_tile = self.scratch["lse_smem"].at[self.index]
        target, head = self.item.target, self.item.head
        out_rows = out_ref.at[target, self.rows, head]
        if "out_smem" in self.scratch or not self.tiles.tiling.slabs:
            out_smem = self.scratch.get("out_smem", self.scratch["q_smem"][0])
            out = out[:, : out_ref.shape[-1]]
            pieces = [(out_smem, out_smem, slice(0, out.shape[1]), None)]
        else:
            zero = lax.axis_index("warpgroup") * 0
            pieces = [
                (tiled(q), swizzled(q), slice(first, first + size), pl.ds(first + zero, size))
                for q, (first, size) in zip(
                    self.scratch["q_smem"], self.tiles.tiling.pieces, strict=True
                )
            ]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for ref, _, columns, _ in pieces:
            ref.at[self.index][...] = out[:, columns].astype(ref.dtype)
        lse_tile[...] = jnp.where(row < used, lse, -jnp.inf)
        plgpu.commit_smem()
        for _, ref, _, columns in pieces:
            rows = out_rows if columns is None else out_rows.at[:, columns]
            plgpu.copy_smem_to_gmem(ref.at[self.index], rows)
        plgpu.copy_smem_to_gmem(lse_tile, lse_ref.at[target, head, self.rows])

    @property
    def softmax_turns(self):
        """Whether one warpgroup's softmax ends before the other's begins."""
        return self.tiles.tiling.turns == "softmax"

    def begin_products(self) -> None:
        """Waits until the other warpgroup has started its products."""
        if self.tiles.tiling.turns == "products":
            plgpu.barrier_wait(self.scratch["turn"].at[self.index])

    def end_products(self) -> None:
        """Lets the other warpgroup start its products."""
        if self.tiles.tiling.turns == "products":
            plgpu.barrier_arrive(self.scratch["turn"].at[1 - self.index])

    def take_turn(self) -> None:
        """Hands the tensor cores to the other warpgroup, or takes them back."""
        plgpu.barrier_arrive(self.scratch["turn"])
        plgpu.barrier_wait(self.scratch["turn"])

    def scores(self, slot, meanwhile=lambda: None, in_flight=0):
        """Products of the queries with a tile of keys."""
        pieces = [
            (tiled(q).at[self.index], tiled(k).at[slot])
            for q, k in zip(self.scratch["q_smem"], self.scratch["k_smem"], strict=True)
        ]

        def products(scores_ref):
            for q, k in pieces:
                plgpu.wgmma(scores_ref, q, k.T)
            meanwhile()
            self.end_products()
            if self.softmax_turns:
                self.take_turn()
            return plgpu.wgmma_accumulator_load(scores_ref, wait_n=in_flight)

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
        return weights.astype(self.dtype), normaliser, new_largest, keep

    def value_pieces(self, slot):
        """Values of a tile, and the columns of the total that each piece adds to."""
        return [
            (tiled(v).at[slot], pl.ds(*piece))
            for v, piece in zip(self.scratch["v_smem"], self.tiles.tiling.pieces, strict=True)
        ]

    def multiply_values(self, total_ref, weights, slot):
        """Starts the product of the weights with the values of a tile."""
        pieces = self.value_pieces(slot)
        for v, columns in pieces:
            target = total_ref if len(pieces) == 1 else total_ref.at[:, columns]
            plgpu.wgmma(target, weights, v)

    def add_values(self, total, weights, slot, meanwhile) -> Any:
        """The total with the values of a tile, by their weights."""
        pieces = self.value_pieces(slot)
        if self.interpret:
            values = jnp.concatenate([v[...] for v, _ in pieces], axis=1)
            total += jnp.dot(weights, values, preferred_element_type=jnp.float32)
            plgpu.commit_smem()  # a plain read is fenced off from the copy that overwrites it
            meanwhile()
        else:

            def add(total_ref):
                self.multiply_values(total_ref, weights, slot)
                meanwhile()

            total = pl.run_state(add)(plgpu.WGMMAAccumulatorRef.init(total))
        plgpu.barrier_arrive(self.scratch["v_used"].at[slot])
        return total

    def loop(self, add_tile, carry, skip=0):
        """Folds the tiles into `carry`; only the last of all may need a mask."""
        full, rest = divmod(self.tiles.num_keys, self.tiles.tiling.block_kv)
        first, last = self.tiles.first + skip, self.tiles.last
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
    if warpgroup.tiles.tiling.overlap:
        return overlapped(warpgroup)
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
        if warpgroup.softmax_turns:
            plgpu.barrier_arrive(scratch["turn"])  # the softmax is done
        plgpu.barrier_wait(scratch["v_ready"].at[slot])
        if warpgroup.softmax_turns:
            plgpu.barrier_wait(scratch["turn"])  # the tensor cores are free
        warpgroup.begin_products()

        def wait_for_next_keys():
            @pl.when(tile + 1 < tiles.last)
            def _():
                plgpu.barrier_wait(scratch["k_ready"].at[tiles.slot(tile + 1)])

        total = warpgroup.add_values(total, weights, slot, wait_for_next_keys)
        return total, normaliser, largest

    plgpu.barrier_wait(scratch["k_ready"].at[tiles.slot(tiles.first)])
    if warpgroup.softmax_turns:
        pl.when(warpgroup.index == 1)(warpgroup.take_turn)
    pl.when(warpgroup.index == 1)(warpgroup.begin_products)
    total, normaliser, largest = warpgroup.loop(add_tile, warpgroup.start())
    if warpgroup.softmax_turns:
        pl.when(warpgroup.index == 0)(warpgroup.take_turn)
    pl.when(warpgroup.index == 0)(warpgroup.end_products)
    out = total / _over_columns(normaliser, total.shape)
    return out, (largest + jnp.log(normaliser) * LOG2_E) * (1 / LOG2_E)


def _filled(shape, value, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _over_columns(rows, shape):
    return lax.broadcast_in_dim(rows, shape, [0])


def overlapped(warpgroup: Warpgroup):
    """The same, each tile's product with its values behind the next tile's softmax."""
    tiles, scratch = warpgroup.tiles, warpgroup.scratch
    turns = warpgroup.softmax_turns

    def add_tile(tile, carry, masked=False):
        total, normaliser, largest, weights = carry
        slot, before = tiles.slot(tile), tiles.slot(tile - 1)
        plgpu.barrier_wait(scratch["k_ready"].at[slot])
        plgpu.barrier_wait(scratch["v_ready"].at[before])
        warpgroup.begin_products()
        if warpgroup.interpret:
            scores = warpgroup.scores(slot)
            total = warpgroup.add_values(total, weights, before, lambda: None)
            weights, normaliser, largest, keep = warpgroup.softmax(
                tile, scores, normaliser, largest, masked
            )
        else:

            def step(refs):
                total_ref, *stats = refs
                pieces = len(tiles.tiling.pieces)
                values = functools.partial(warpgroup.multiply_values, total_ref, weights, before)
                scores = warpgroup.scores(slot, values, in_flight=pieces)
                news = warpgroup.softmax(tile, scores, normaliser, largest, masked)
                for ref, new in zip(stats, news, strict=True):
                    ref[...] = new

            total_ref: Any = plgpu.WGMMAAccumulatorRef.init(total)
            total, weights, normaliser, largest, keep = pl.run_state(step)(
                (total_ref, weights, normaliser, largest, largest)
            )
            plgpu.barrier_arrive(scratch["v_used"].at[before])
        total *= _over_columns(keep, total.shape)
        if turns:
            warpgroup.take_turn()
        return total, normaliser, largest, weights

    plgpu.barrier_wait(scratch["k_ready"].at[tiles.slot(tiles.first)])
    if turns:
        pl.when(warpgroup.index == 1)(warpgroup.take_turn)
    pl.when(warpgroup.index == 1)(warpgroup.begin_products)
    total, *stats = warpgroup.start()
    ragged = tiles.num_keys % tiles.tiling.block_kv > 0  # the first may be the last
    scores = warpgroup.scores(tiles.slot(tiles.first))
    weights, *stats, _ = warpgroup.softmax(tiles.first, scores, *stats, ragged)
    if turns:
        warpgroup.take_turn()
    carry = warpgroup.loop(add_tile, (total, *stats, weights), skip=1)
    total, normaliser, largest, weights = carry
    slot = tiles.slot(tiles.last - 1)
    plgpu.barrier_wait(scratch["v_ready"].at[slot])
    warpgroup.begin_products()
    total = warpgroup.add_values(total, weights, slot, lambda: None)
    if turns:
        pl.when(warpgroup.index == 0)(warpgroup.take_turn)
    pl.when(warpgroup.index == 0)(warpgroup.end_products)
    out = total / _over_columns(normaliser, total.shape)
    return out, (largest + jnp.log(normaliser) * LOG2_E) * (1 / LOG2_E)
