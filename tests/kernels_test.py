"""The kernels under the interpreters, against float64, with inputs that are new at every run."""

import functools
import itertools
import json
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import assert_close, assert_rounded, by_hand, new_seed, random_inputs
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from astraea_jax.attention import gather_rows, query_sparse_attention
from astraea_jax.bench.shapes import SHAPES, SHARES, rows
from astraea_jax.checks import Refusal
from astraea_jax.kernels import ampere, backward, dispatch, hopper, splits, tilings
from astraea_jax.kernels.hopper_tiling import fitted
from astraea_jax.kernels.machine import Gpu, gpu

pytestmark = pytest.mark.core

H200 = Gpu((9, 0), 132, "NVIDIA H200")
A100 = Gpu((8, 0), 108, "NVIDIA A100-SXM4-80GB")
OLD = Gpu((7, 5), 40, "Tesla T4")


@pytest.fixture
def with_gpu(monkeypatch, tmp_path):
    """Traces for a named GPU within the test; nothing that a user has measured is read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def use(name="NVIDIA H100 80GB HBM3"):
        device = AbstractDevice(device_kind=name, num_cores=4, platform="gpu")
        return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))

    return use


def assert_right(got, q, k, v, count, seed):
    """`out` is float64's but for rounding, `lse` to 1e-5; rows past `count` are 0 and -inf."""
    out, lse = got
    expected, expected_lse = by_hand(q, k, v)
    assert out.dtype == v.dtype and lse.dtype == jnp.float32
    assert not np.isnan(np.asarray(out, np.float32)).any()
    for row, used in enumerate(count):
        batch, some = slice(row, row + 1), np.s_[row : row + 1, :used]
        assert not np.asarray(out[row, used:]).any()
        assert (np.asarray(lse[row, :, used:]) == -np.inf).all()
        if used:
            assert_rounded(out[some], expected[some], q[some], k[batch], v[batch], seed)
            assert_close(lse[row, :, :used], expected_lse[row, :, :used], 1e-5, seed)


# Tiles that are whole, cut off and dead; more tiles than buffers; every width and its padding.
# The interpreter looks for races, and fills what is not written with NaN.
HOPPER = [  # B, K, N, A, C, count, tiling, splits, dtype
    ((1, 130, 200, 2, 72), (129,), hopper.Tiling(80, 64, 2), 1, jnp.bfloat16),
    ((2, 24, 152, 1, 128), (20, 0), hopper.Tiling(128, 64, 2, False, whole=True), 2, jnp.float16),
    ((1, 7, 256, 1, 64), (1,), hopper.Tiling(64, 128, 2), 1, jnp.bfloat16),
    ((1, 128, 33, 1, 96), (128,), hopper.Tiling(96, 64, 2, persistent=False), 1, jnp.bfloat16),
]


@pytest.mark.slow
def test_hopper_with_the_last_queries_in_a_launch_of_their_own(with_gpu):
    seed, count = new_seed(), (130, 100)
    q, k, v = random_inputs(seed, (2, 136, 152, 1, 128), jnp.bfloat16)
    attend = functools.partial(
        hopper.attend, scale=128**-0.5, tiling=hopper.Tiling(128, 64, 2, False, whole=True),
        tail=splits.Tail(1, 2), interpret=True,
    )  # fmt: skip
    with with_gpu():
        got = jax.jit(attend)(q, k, v, jnp.array(count, jnp.int32))
    assert_right(got, q, k, v, count, seed)


@pytest.mark.parametrize(("shape", "count", "tiling", "parts", "dtype"), HOPPER, ids=str)
def test_hopper(with_gpu, shape, count, tiling, parts, dtype):
    seed = new_seed()
    q, k, v = random_inputs(seed, shape, dtype)
    attend = functools.partial(
        hopper.attend, scale=shape[-1] ** -0.5, tiling=tiling, splits=parts, interpret=True
    )
    with with_gpu():
        got = jax.jit(attend)(q, k, v, jnp.array(count, jnp.int32))
    assert_right(got, q, k, v, count, seed)


THREE_WARPGROUPS = """
import jax.numpy as jnp
from attention_oracle import new_seed, random_inputs
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from kernels_test import assert_right
from astraea_jax.kernels import hopper

seed = new_seed()
q, k, v = random_inputs(seed, (1, 200, 150, 1, 72), jnp.bfloat16)
device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=1, platform="gpu")
with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
    got = hopper.attend(
        q, k, v, jnp.array([129], jnp.int32), scale=72**-0.5, splits=1, interpret=True,
        tiling=hopper.Tiling(80, 64, 2, warpgroups=3),
    )
assert_right(got, q, k, v, (129,), seed)
"""


@pytest.mark.slow
def test_hopper_with_three_warpgroups():
    # Each of the interpreter's threads waits in a thread of the runtime's: as many as NPROC says.
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "NPROC": "8",
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)]),
    }
    command = [sys.executable, "-c", THREE_WARPGROUPS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]


AMPERE = [  # the same, and whether the queries are those of all tokens, with indices
    ((2, 37, 70, 2, 72), (37, 0), ampere.Tiling(32, 32, 4, 2), 1, jnp.bfloat16, False),
    ((1, 20, 300, 2, 64), (13,), ampere.Tiling(16, 64, 4, 2), 3, jnp.float16, True),
    ((2, 15, 15, 1, 72), (15, 1), ampere.Tiling(16, 16, 1, 1), 1, jnp.bfloat16, True),
    ((1, 64, 64, 1, 128), (64,), ampere.Tiling(32, 32, 4, 2), 1, jnp.bfloat16, False),
]


@pytest.mark.parametrize(("shape", "count", "tiling", "parts", "dtype", "gather"), AMPERE, ids=str)
def test_ampere(shape, count, tiling, parts, dtype, gather):
    seed = new_seed()
    q, k, v = random_inputs(seed, shape, dtype)
    attend = functools.partial(
        ampere.attend, scale=shape[-1] ** -0.5, tiling=tiling, splits=parts, interpret=True
    )
    counts = jnp.array(count, jnp.int32)
    if not gather:
        assert_right(jax.jit(attend)(q, k, v, counts), q, k, v, count, seed)
        return
    rng = np.random.default_rng(seed)
    order = np.stack([rng.permutation(shape[1]) for _ in count])
    shuffled = jnp.take_along_axis(q, jnp.asarray(np.argsort(order))[:, :, None, None], axis=1)
    # Padding past the end is clipped, whatever it is.
    indices = jnp.where(np.arange(shape[1]) < counts[:, None], np.asarray(order), 10**6)
    got = jax.jit(attend)(shuffled, k, v, counts, indices)
    assert_right(got, q, k, v, count, seed)


def test_negative_scale(with_gpu):
    seed = new_seed()
    q, k, v = random_inputs(seed, (1, 16, 32, 1, 64), jnp.bfloat16)
    expected, expected_lse = by_hand(q, k, v, -0.1)
    with with_gpu():
        out, lse = hopper.attend(q, k, v, None, scale=-0.1, interpret=True)
    assert_rounded(out, expected, q, k, v, seed, -0.1)
    assert_close(lse, expected_lse, 1e-5, seed)


@pytest.mark.parametrize(("queries", "heads"), [(130, 2), (1, 1), (1590, 1), (20, 3)])
def test_no_copy_runs_over_into_the_next_row(with_gpu, monkeypatch, queries, heads):
    # A contiguous copy is cut off at the end of the array only; the interpreter is kinder.
    seen = []

    def kernel(body, *, out_type, **rest):
        seen.extend(out_type)
        return plgpu_kernel(body, out_type=out_type, **rest)

    plgpu_kernel = hopper.plgpu.kernel
    monkeypatch.setattr(hopper.plgpu, "kernel", kernel)
    sizes = [(2, length, heads, 72) for length in (queries, 90, 90)]
    arguments = [jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in sizes]
    attend = functools.partial(hopper.attend, count=None, scale=1.0, splits=1)
    with with_gpu():
        out, lse = jax.eval_shape(attend, *arguments)
    assert out.shape == sizes[0] and lse.shape == (2, heads, queries)
    rows, lses = seen
    assert rows.shape == out.shape  # a copy of pieces ends where the array does, on every axis
    assert lses.shape[-1] % 192 == 0 and lses.shape[-1] >= queries


def test_what_does_not_fit_is_made_to():
    tiling = hopper.Tiling(128, 192, 2, persistent=False, whole=True)
    assert fitted(tiling, 1000, 1592, 128, partial=False) == tiling
    for queries, keys, width in ((1001, 1592, 128), (1000, 1590, 128), (1000, 1592, 120)):
        assert not fitted(tiling, queries, keys, width, partial=False).whole
    # The output of a part of the keys has rows of its own.
    smaller = fitted(tiling, 1000, 1592, 128, partial=True)
    assert (smaller.block_kv, smaller.stages) == (128, 2)


@pytest.mark.slow
def test_vmap_of_both(with_gpu):
    seed = new_seed()
    q, k, v = random_inputs(seed, (2, 16, 40, 1, 64), jnp.bfloat16)
    count = jnp.array([16, 3], jnp.int32)
    kernels = (
        functools.partial(ampere.attend, tiling=ampere.Tiling(16, 16, 1, 1)),
        functools.partial(hopper.attend, tiling=hopper.Tiling(64, 64, 2)),
    )
    keys, values = k[:1], v[:1]
    for kernel in kernels:
        # Keys and values are shared, as by candidates that differ in their queries.
        def attend(q, count, kernel=kernel):
            return kernel(q[None], keys, values, count[None], scale=0.125, interpret=True)

        with with_gpu():
            out, lse = jax.jit(jax.vmap(attend))(q, count)
        both = jnp.concatenate([keys] * 2), jnp.concatenate([values] * 2)
        assert_right((out[:, 0], lse[:, 0]), q, *both, (16, 3), seed)


def test_merge_of_parts_is_exact():
    seed = new_seed()
    q, k, v = random_inputs(seed, (2, 5, 40, 3, 16))
    cuts = (0, 1, 40)
    pairs = itertools.pairwise(cuts)
    parts = [query_sparse_attention(q, k[:, a:b], v[:, a:b]) for a, b in pairs]
    out, lse = splits.merge(*map(jnp.stack, zip(*parts, strict=True)))
    expected, expected_lse = by_hand(q, k, v)
    assert_close(out, expected, 1e-6, seed, v)
    assert_close(lse, expected_lse, 1e-6, seed)
    nothing = jnp.zeros((2, 1, 3, 1, 4)), jnp.full((2, 1, 1, 3), -jnp.inf)
    out, lse = splits.merge(*nothing)
    assert not np.asarray(out).any() and (np.asarray(lse) == -np.inf).all()


@pytest.mark.parametrize(
    ("programs", "tiles", "parts"), [(1, 100, 16), (12, 100, 11), (60, 3, 2), (67, 9, 1), (9, 1, 1)]
)
def test_parts_fill_the_chip(programs, tiles, parts):
    assert splits.num_splits(programs, tiles, 132) == parts


@pytest.mark.parametrize(
    ("tiles", "heads", "keys", "left", "least"),
    [
        (128, 24, 171, 2, 0.018),  # half of 81 frames of Wan: 23 waves and 36 programs
        (256, 24, 171, 0, 0),  # all of them: 46 waves and 72 programs, less than a percent to gain
        (55, 24, 74, 0, 0),  # half of 33 frames: ten full waves
        (13, 240, 9, 0, 0),  # OpenSora: few keys, so that a launch costs more
        (2, 24, 171, 0, 0),  # no full wave
    ],
)
def test_a_last_wave_that_fills_little_is_cut_along_the_keys(tiles, heads, keys, left, least):
    tail = splits.tail(tiles, heads, keys, 132)
    assert tail.tiles == left and (tail.splits > 1) == (left > 0)
    waves = -(-tiles * heads // 132)
    cut = -(-(tiles - left) * heads // 132) + -(-left * heads * tail.splits // 132) / tail.splits
    assert 1 - cut / waves >= least


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.filterwarnings("ignore:attention falls back")  # from cuDNN, which is not here
def test_named_shapes_lower_for_cuda(with_gpu, name):
    shape = SHAPES[name]
    sizes = [
        (shape.batch, length, *shape[2:]) for length in (rows(shape, 0.5), *[shape.tokens] * 2)
    ]
    arguments = [jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in sizes]
    with with_gpu():
        traced = jax.jit(query_sparse_attention).trace(*arguments)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    short = shape.tokens <= 64
    assert ("triton" in text, "mosaic_gpu" in text) == (short, not short)


def test_the_platform_is_chosen_at_lowering(with_gpu):
    q, k, v = random_inputs(new_seed(), (1, 100, 130, 2, 64), jnp.bfloat16)
    plain = query_sparse_attention(q, k, v, implementation="xla")
    for name, target in (("NVIDIA H200", "mosaic_gpu"), ("NVIDIA A100-SXM4-40GB", "triton")):
        with with_gpu(name):
            jitted = jax.jit(lambda *x: query_sparse_attention(*x))
            traced = jitted.trace(q, k, v)
            assert target in traced.lower(lowering_platforms=("cuda",)).as_text()
            # The same trace on this machine runs the reference, and lowers no kernel.
            assert target not in traced.lower(lowering_platforms=("cpu",)).as_text()
            out, lse = jitted(q, k, v)
        assert np.array_equal(out, plain[0]) and np.array_equal(lse, plain[1])


def interpreted(monkeypatch):
    """Makes "triton" run here, under the interpreter."""
    module = types.SimpleNamespace(
        refusal=lambda *_: None,
        attend=functools.partial(
            ampere.attend, tiling=ampere.Tiling(16, 16, 1, 1), splits=1, interpret=True
        ),
    )
    monkeypatch.setattr(dispatch, "gpu", lambda: A100)
    monkeypatch.setattr(dispatch, "kernel_module", lambda name: module)


@pytest.mark.parametrize("form", ["rows", "indices"])
def test_gradient_is_that_of_the_reference(monkeypatch, form):
    monkeypatch.setattr(backward, "KEY_TILE", 16)
    interpreted(monkeypatch)
    seed = new_seed()
    q, k, v = random_inputs(seed, (2, 12, 40, 2, 16))
    count = jnp.array([12, 5], jnp.int32)
    rng = np.random.default_rng(seed)
    indices = jnp.asarray(np.stack([rng.permutation(12)[:9] for _ in range(2)]))
    if form == "indices":
        count = jnp.array([9, 5], jnp.int32)
    weights = [rng.normal(size=size) for size in ((2, 12, 2, 16), (2, 2, 12))]

    def loss(q, k, v, name):
        rows = indices if form == "indices" else None
        out, lse = query_sparse_attention(
            q, k, v, indices=rows, count=count, scale=0.3, implementation=name
        )
        lse = jnp.where(jnp.isneginf(lse), 0.0, lse)
        number = out.shape[1]
        return (out * weights[0][:, :number]).sum() + (lse * weights[1][..., :number]).sum()

    got, expected = (
        jax.jit(jax.grad(functools.partial(loss, name=name), argnums=(0, 1, 2)))(q, k, v)
        for name in ("triton", "xla")
    )
    for mine, reference in zip(got, expected, strict=True):
        assert np.asarray(reference).any()
        assert_close(mine, np.asarray(reference, np.float64), 2e-5, seed)


def test_rows_by_index_are_gathered_rows():
    seed = new_seed()
    q, k, v = random_inputs(seed, (2, 30, 30, 2, 16))
    indices = jnp.asarray(np.random.default_rng(seed).integers(0, 30, (2, 11)))
    for got, expected in zip(
        query_sparse_attention(q, k, v, indices=indices),
        query_sparse_attention(gather_rows(q, indices), k, v),
        strict=True,
    ):
        assert np.array_equal(got, expected)


def test_an_index_out_of_range_is_refused_where_it_is_known():
    q, k, v = random_inputs(0, (1, 4, 4, 1, 8))
    with pytest.raises(ValueError, match=r"expected indices in 0\.\.3; got 0\.\.4"):
        query_sparse_attention(q, k, v, indices=jnp.array([[0, 4]]))
    with pytest.raises(ValueError, match=r"got -1\.\.2"):
        query_sparse_attention(q, k, v, indices=jnp.array([[2, -1]]))
    # Past the rows in use, and where it is traced, it is padding.
    padded = functools.partial(query_sparse_attention, q, k, v)
    padded(indices=jnp.array([[0, 4]]), count=jnp.array([1], jnp.int32))
    jax.jit(lambda indices: padded(indices=indices))(jnp.array([[0, 4]]))


@pytest.mark.parametrize("name", ["cudnn", "triton", "mosaic"])
def test_named_ones_that_cannot_run_say_why(monkeypatch, name):
    q, k, v = random_inputs(0, (1, 4, 4, 1, 8))
    attend = functools.partial(query_sparse_attention, implementation=name)
    with pytest.raises(ValueError, match=rf"'{name}' can't run: it needs an NVIDIA GPU"):
        attend(q, k, v)
    monkeypatch.setattr(dispatch, "gpu", lambda: H200)
    with pytest.raises(ValueError, match="takes bfloat16 and float16; got float32: cast"):
        attend(q, k, v)
    wide = random_inputs(0, (1, 4, 4, 1, 136), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"takes head widths to 128.*got 136"):
        attend(*wide)
    monkeypatch.setattr(dispatch, "gpu", lambda: OLD)
    with pytest.raises(ValueError, match=r"needs compute capability .*Tesla T4 has 7\.5"):
        attend(q.astype(jnp.bfloat16), k.astype(jnp.bfloat16), v.astype(jnp.bfloat16))


def test_a_backend_that_is_gone_is_named(monkeypatch):
    def gone(name):
        raise ImportError("cannot import name 'triton'")

    monkeypatch.setattr(dispatch, "kernel_module", gone)
    reason = dispatch.refusal("triton", A100, 128, jnp.bfloat16)
    assert reason == "this JAX has no such back end (cannot import name 'triton')"


def test_falling_back_is_said_once(monkeypatch):
    dispatch._say_once.cache_clear()
    choose = functools.partial(dispatch._first_that_runs, ("mosaic", "triton", "xla"), H200)
    with pytest.warns(UserWarning, match="falls back to xla: mosaic takes head widths to 128"):
        assert choose(160, jnp.dtype(jnp.bfloat16)) == "xla"
    # Not again, and not for float32, which no kernel is meant for: a warning would be an error.
    assert choose(160, jnp.dtype(jnp.bfloat16)) == "xla"
    assert choose(128, jnp.dtype(jnp.float32)) == "xla"
    assert choose(128, jnp.dtype(jnp.bfloat16)) == "mosaic"


def test_too_many_numbers_for_offsets():
    many = functools.partial(dispatch.refusal, "triton", A100, 128, jnp.bfloat16)
    assert many(2**31 - 1) is None
    assert "at most 2147483647 numbers; got 2147483648: split the batch" in many(2**31)
    dispatch._say_once.cache_clear()
    with pytest.warns(UserWarning, match="triton takes arrays of at most"):
        assert dispatch._first_that_runs(("triton", "xla"), A100, 128, "bf16", 2**31) == "xla"


def test_preferences():
    def first(here, *lengths):
        return dispatch.preferred(here, *lengths)[0]

    assert dispatch.preferred(None, 1000, 1000) == ("xla",)
    assert first(H200, 1000, 1000) == first(H200, 65, 512) == "mosaic"
    assert first(H200, 15, 15) == first(H200, 1000, 64) == first(A100, 500, 500) == "triton"


def test_the_gpu_is_that_of_the_mesh(with_gpu):
    assert gpu() is None
    with with_gpu("NVIDIA GH200 480GB"):
        assert gpu() == Gpu((9, 0), 4, "NVIDIA GH200 480GB")
    with with_gpu("NVIDIA L40S"):
        assert gpu().version == "8.9"


def test_every_width_and_length_has_a_tiling(with_gpu):
    for width, shape, share in itertools.product((8, 64, 72, 96, 128), SHAPES.values(), SHARES):
        lengths = rows(shape, share), shape.tokens
        for name, version in (("mosaic", "9.0"), ("triton", "8.0"), ("triton", "9.0")):
            tiling = tilings.find(name, version, width, *lengths)
            dispatch.kernel_module(name).Tiling(**tiling)
            if name == "mosaic":
                assert tiling["width"] >= width


MINE = dict(block_q=64, block_kv=32, warps=2, stages=4)


def test_measured_tilings_come_first(with_gpu, monkeypatch):
    row = dict(implementation="triton", capability="9.0", width=128, queries=1024, keys=2048)
    shipped = tilings.find("triton", "9.0", 128, 1000, 2000)
    mine = MINE
    path = tilings.remember([row | {"tiling": mine | {"stages": 9}}])
    assert path == tilings.remember([row | {"tiling": mine}]) == tilings.user_table()
    assert tilings.find("triton", "9.0", 128, 1000, 2000) == mine
    assert tilings.find("triton", "9.0", 128, 1000, 2049) == shipped
    assert tilings.find("triton", "8.0", 128, 1000, 2000) != mine
    path.write_text('[{"width": 3}]')
    with pytest.raises(ValueError, match=r"(?s)tilings.json: row 0.*delete the file.*is missing"):
        tilings.find("triton", "9.0", 128, 1000, 2000)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(implementation="cudnn"), "implementation must be 'mosaic' or 'triton'"),
        (dict(width=True), "width must be an integer"),
        (dict(queries="many"), "queries must be an integer"),
        (dict(tiling=[64]), "tiling must be an object"),
        (dict(tiling=dict(MINE, warps=0)), "warps must be an integer"),
        (dict(tiling=dict(MINE, stage=3)), "'stage' is not known"),
    ],
)
def test_a_table_of_tilings_is_checked_by_field(changes, words, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    row = dict(implementation="triton", capability="9.0", width=128, queries=1024, keys=2048)
    tilings.remember([row | {"tiling": MINE}])
    (kept,) = json.loads(tilings.user_table().read_text())
    tilings.user_table().write_text(json.dumps([kept | changes]))
    with pytest.raises(Refusal, match=words):
        tilings.find("triton", "9.0", 128, 1000, 2000)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
