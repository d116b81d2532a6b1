"""Query-only attention on Hopper (sm_90): Pallas Mosaic GPU, wgmma, TMA, warp-specialised.

Two or three warpgroups of a program compute, 64 queries each; one only loads keys and values. Two
take turns: while one multiplies on the tensor cores, the other does its softmax. Three, for heads
to 96 channels, leave the order to the hardware.

What counts, for 64 queries and 128 keys of 72 channels: 640 cycles of the tensor cores (64 for
each 16 of 80 channels in the scores, 40 for each 16 keys in the values), 512 of the unit that makes
exponentials, 420 instructions of each warp. No one of them is the limit as long as a warpgroup's
softmax hides behind another's products; but a copy that pads the heads took .11 ms of .63 for
opensora-spatial-15, hence the pieces of `hopper_memory`.

What `notebooks/studies/compile_report.py` says of the shipped tilings (jax 0.12.0.1, ptxas
13.5): one program a processor, no spills, registers at launch (2 warpgroups: 168, then 240 for
those that compute and 24 for the one that loads; 3 warpgroups: 128, then 160 and 32):

    C    width  block_kv  stages  warpgroups  persistent   bytes of shared memory: keys in parts
    64   64     128       4       3           yes                    157696         206848
    72   80     128       4       3           yes                    196608         217088
    96   96     128       3       3           yes                    186368         210944
    128  128    192       2       2           no                     231424         231424

Measured on H100s 80GB (jax 0.11.2, bfloat16, with the log-sum-exp; attention.json in
notebooks/studies), K = N, against the floor of an H200 (790 TFLOP/s, 4.3 TB/s), milliseconds:

    shape                mosaic   cudnn   triton    xla   floor
    wan-33                 1.88    2.16     2.96   16.9    1.53    triton and xla: in another run
    wan-65                 6.55    7.67    10.76   56.6    5.47
    wan-81                10.1    11.7                     8.35
    wan-14b-720p          186.1   208.8                     148    block_kv 128, persistent
    opensora-spatial-15    0.47    0.65     0.89    4.1    0.22
    opensora-temporal-15   0.92    0.56     0.11    0.35   0.05    before heads came in pieces

Source: FlashAttention-3; the structure is that of jax.experimental.pallas.ops.gpu.attention_mgpu.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from astraea_jax.kernels import machine, tilings
from astraea_jax.kernels import splits as split
from astraea_jax.kernels.hopper_memory import scratch_types
from astraea_jax.kernels.hopper_program import program
from astraea_jax.kernels.hopper_tiling import LOG2_E, fitted
from astraea_jax.kernels.hopper_tiling import Tiling as Tiling
from astraea_jax.kernels.hopper_tiling import candidates as candidates
from astraea_jax.kernels.machine import Gpu, gpu


def refusal(here: Gpu, width: int, dtype) -> str | None:
    """Why this kernel can't take heads of this width and dtype on this GPU; None if it can."""
    if here.capability != (9, 0):
        return f"needs compute capability 9.0 (Hopper); {here.kind} has {here.version}"
    return machine.refusal(here, width, dtype)


def attend(
    q: Float[Array, "B K A C"],
    k: Float[Array, "B N A C"],
    v: Float[Array, "B N A C"],
    count: Int[Array, "B"] | None,
    *,
    scale: float,
    tiling: Tiling | None = None,
    splits: int | None = None,
    tail: split.Tail | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B K A C"], Float[Array, "B A K"]]:
    """See `astraea_jax.attention.query_sparse_attention`.

    Args:
      q: selected queries.
      k: keys.
      v: values.
      count: rows in use.
      scale: factor on the logits.
      tiling: None means by the table.
      splits: parts of the keys that go to programs of their own; None means as many as fill a chip.
      tail: the last queries, with the keys in parts of their own; None means where that saves time.
      interpret: run on a CPU, under the interpreter, with race detection.
    """
    here = gpu()
    if tiling is None:
        version = here.version if here else "any"
        sizes = q.shape[3], q.shape[1], k.shape[1]
        tiling = Tiling(**tilings.find("mosaic", version, *sizes))
    processors = here.processors if here else 1
    tiles, heads = pl.cdiv(q.shape[1], tiling.rows), q.shape[0] * q.shape[2]
    num_kv_tiles = pl.cdiv(k.shape[1], tiling.block_kv)
    if splits is None:
        splits = split.num_splits(tiles * heads, num_kv_tiles, processors)
    if tail is None:
        one = splits > 1 or processors == 1  # a chip that nothing is known of
        tail = split.Tail(0, 1) if one else split.tail(tiles, heads, num_kv_tiles, processors)
    if count is None:
        count = jnp.full((q.shape[0],), q.shape[1], jnp.int32)
    if scale < 0:  # the running maximum is that of the unscaled scores
        q, scale = -q, -scale
    run = functools.partial(
        _rows, scale=scale * LOG2_E, tiling=tiling, processors=processors, interpret=interpret
    )
    if not tail.tiles:
        return run(q, k, v, count, tiles=tiles, splits=splits)
    out, lse = run(q, k, v, count, tiles=tiles - tail.tiles, splits=splits)
    first = (tiles - tail.tiles) * tiling.rows
    # One after the other, as on a GPU anyway: the interpreter hangs with two kernels at once.
    out, lse, last = lax.optimization_barrier((out, lse, q[:, first:]))
    last_out, last_lse = run(last, k, v, count - first, tiles=tail.tiles, splits=tail.splits)
    # Both are written in place: the first launch has left these rows alone.
    return out.at[:, first:].set(last_out), lse.at[:, :, first:].set(last_lse)


def _rows(q, k, v, count, *, scale, tiling, tiles, splits, processors, interpret):
    """Attention of the first tiles of queries; what lies past them is not written."""
    num_queries, width = q.shape[1], q.shape[3]
    tiling = fitted(tiling, num_queries, k.shape[1], width, splits > 1)
    # Copies start at multiples of 16 bytes.
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -width % 8))) for x in (q, k, v))
    outs, lses = _call(
        q,
        k,
        v,
        count,
        scale=scale,
        tiling=tiling,
        tiles=tiles,
        splits=splits,
        processors=processors,
        interpret=interpret,
    )
    outs, lses = outs[..., :width], lses[:, :, :num_queries]
    if splits == 1:
        return outs, lses
    out, lse = split.merge(*(x.reshape(splits, -1, *x.shape[1:]) for x in (outs, lses)))
    return out.astype(v.dtype), lse


def _call(q, k, v, count, *, scale, tiling, tiles, splits, processors, interpret):
    """The kernel: outputs and log-sum-exps of each part of the keys, the latter of whole tiles."""
    batch, num_queries, heads, width = q.shape
    num_items = batch * heads * tiles * splits
    num_programs = min(num_items, processors) if tiling.persistent else num_items
    body = functools.partial(
        program,
        scale=scale,
        splits=splits,
        num_items=num_items,
        num_programs=num_programs,
        tiling=tiling,
        interpret=interpret,
    )
    # A copy of contiguous numbers knows no end of a row, only of the array.
    num_rows = num_queries + -num_queries % tiling.rows
    # Pieces can be seen in two ways in one of the two only.
    lane, warpgroup = plgpu.LoweringSemantics.Lane, plgpu.LoweringSemantics.Warpgroup
    call = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(
                (splits * batch, num_queries, heads, width), jnp.float32 if splits > 1 else v.dtype
            ),
            jax.ShapeDtypeStruct((splits * batch, heads, num_rows), jnp.float32),
        ),
        # Neighbours in the grid share keys and values, and find them in L2.
        grid=(num_programs,),
        grid_names=("program",),
        num_threads=tiling.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=scratch_types(q.dtype, tiling, partial=splits > 1, interpret=interpret),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=512,
            lowering_semantics=warpgroup if tiling.whole else lane,
        ),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )
    return call(q, k, v, count.astype(jnp.int32))
