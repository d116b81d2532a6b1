"""Query-only attention on Hopper (sm_90): Pallas Mosaic GPU, wgmma, TMA, warp-specialised.

A program has two compute warpgroups of 64 queries each, which take turns: while one multiplies on
the tensor cores, the other does its softmax. A third warpgroup only loads keys and values.

What `python -m astraea_jax.bench.compile_report` says of the shipped tilings (jax 0.12.0.1): 168
registers a thread at launch (240 for those that compute, 24 for those that load), one program a
processor, and no spills:

    C    width  block_kv  stages  persistent   bytes of shared memory: keys whole   in parts
    64   64     128       3       yes                               116736         149504
    72   80     128       3       yes                               163840         186368
    96   96     128       3       yes                               174080         223232
    128  128    192       2       no                                231424         231424

Measured on an H100 80GB (jax 0.11.2, bfloat16, with the log-sum-exp; bench/attention.json), K = N,
against the floor of an H200 (790 TFLOP/s, 4.3 TB/s), milliseconds:

    shape                mosaic   cudnn   triton    xla   floor
    wan-33                 1.88    2.18     2.96   16.9    1.53    triton and xla: in another run
    wan-65                 6.58    7.61    10.76   56.6    5.47
    wan-81                10.74   11.60                    8.35    block_kv 128, persistent
    wan-14b-720p          186.1   208.8                     148    block_kv 128, persistent
    opensora-spatial-15    0.63    0.63     0.89    4.1    0.22    mosaic 0.52 if given padded
    opensora-temporal-15   0.92    0.56     0.11    0.35   0.05

Source: FlashAttention-3; the structure is that of jax.experimental.pallas.ops.gpu.attention_mgpu.
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from astraea_jax.kernels import machine, tilings
from astraea_jax.kernels import splits as split
from astraea_jax.kernels.hopper_program import program, scratch_types
from astraea_jax.kernels.hopper_tiling import LOG2_E, SHARED_MEMORY, shared_memory
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
      interpret: run on a CPU, under the interpreter, with race detection.
    """
    batch, num_queries, heads, width = q.shape
    num_keys = k.shape[1]
    here = gpu()
    if tiling is None:
        found = tilings.find(
            "mosaic", here.version if here else "any", width, num_queries, num_keys
        )
        tiling = Tiling(**found)
    num_tiles = pl.cdiv(num_queries, tiling.rows)
    processors = here.processors if here else 1
    if splits is None:
        num_kv_tiles = pl.cdiv(num_keys, tiling.block_kv)
        splits = split.num_splits(batch * heads * num_tiles, num_kv_tiles, processors)
    # Rows of 72 channels, say, are stored as they are; others in tiles of 8 rows. (Those of a
    # single head are contiguous: a copy of them would not stop at the last.)
    plain = splits == 1 and width % 16 == 8 and heads > 1 and not tiling.slabs
    exact = plain or (tiling.slabs and splits == 1)
    out_shape = (num_queries, heads, width) if exact else _padded(q.shape, tiling.width)
    own_rows = plain or splits > 1
    out_dtype = jnp.dtype(v.dtype if splits == 1 else jnp.float32)
    out_bytes = own_rows * tiling.rows * out_shape[-1] * out_dtype.itemsize
    while shared_memory(tiling) + out_bytes > SHARED_MEMORY:
        smaller = {"stages": tiling.stages - 1} if tiling.block_kv <= 128 else {"block_kv": 128}
        tiling = dataclasses.replace(tiling, **smaller)
    if count is None:
        count = jnp.full((batch,), num_queries, jnp.int32)
    if scale < 0:  # the running maximum is that of the unscaled scores
        q, scale = -q, -scale
    if not tiling.slabs:
        q, k, v = (_pad(x, tiling.width) for x in (q, k, v))
    num_items = batch * heads * num_tiles * splits
    num_programs = min(num_items, processors) if tiling.persistent else num_items
    body = functools.partial(
        program,
        scale=scale * LOG2_E,
        num_keys=num_keys,
        splits=splits,
        num_items=num_items,
        num_programs=num_programs,
        tiling=tiling,
        interpret=interpret,
    )
    call = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((splits * batch, *out_shape), out_dtype),
            # Whole tiles: a copy of contiguous numbers knows no end of a row, only of the array.
            jax.ShapeDtypeStruct((splits * batch, heads, num_tiles * tiling.rows), jnp.float32),
        ),
        # Neighbours in the grid share keys and values, and find them in L2.
        grid=(num_programs,),
        grid_names=("program",),
        num_threads=tiling.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=scratch_types(
            q.dtype, tiling, (out_shape[-1], out_dtype) if own_rows else None, interpret
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=512,
            lowering_semantics=(
                plgpu.LoweringSemantics.Lane if tiling.slabs else plgpu.LoweringSemantics.Warpgroup
            ),
        ),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )
    outs, lses = call(q, k, v, count.astype(jnp.int32))
    outs, lses = outs[:, :num_queries, :, :width], lses[:, :, :num_queries]
    if splits == 1:
        return outs, lses
    parts = (x.reshape(splits, batch, *x.shape[1:]) for x in (outs, lses))
    out, lse = split.merge(*parts)
    return out.astype(v.dtype), lse


def _padded(shape, width: int) -> tuple[int, int, int]:
    """Rows, heads and channels once padded: to the 8 rows of a tile, and to the tiling's width."""
    return shape[1] + -shape[1] % 8, shape[2], width


def _pad(x, width: int):
    """The same, with zeros."""
    rows, _, width = _padded(x.shape, width)
    return jnp.pad(x, ((0, 0), (0, rows - x.shape[1]), (0, 0), (0, width - x.shape[3])))
