"""Query-sparse attention against float64 by hand, with inputs that are new at every run."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import assert_close, assert_rounded, by_hand, new_seed, random_inputs

from astraea_jax import attention
from astraea_jax.attention import gather_rows, query_sparse_attention, scatter_rows

pytestmark = pytest.mark.core

SHAPES = [  # B, K, N, A, C
    (1, 1, 1, 1, 8),
    (2, 7, 33, 3, 16),
    (1, 65, 130, 2, 72),
    (2, 31, 97, 2, 128),
]
TILES = [(2048, 2048), (8, 16), (7, 13), (3, 1), (64, 31)]


@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(monkeypatch, shape, tiles):
    monkeypatch.setattr(attention, "QUERY_TILE", tiles[0])
    monkeypatch.setattr(attention, "KEY_TILE", tiles[1])
    seed = new_seed()
    q, k, v = random_inputs(seed, shape)
    out, lse = query_sparse_attention(q, k, v)
    assert out.dtype == lse.dtype == jnp.float32
    expected, expected_lse = by_hand(q, k, v)
    assert_close(out, expected, 1e-6, seed, v)
    assert_close(lse, expected_lse, 1e-6, seed)


def test_more_keys_and_queries_than_a_tile():
    shape = (1, attention.QUERY_TILE + 3, attention.KEY_TILE + 6, 1, 16)
    seed = new_seed()
    q, k, v = random_inputs(seed, shape)
    out, lse = jax.jit(query_sparse_attention)(q, k, v)
    expected, expected_lse = by_hand(q, k, v)
    assert_close(out, expected, 1e-6, seed, v)
    assert_close(lse, expected_lse, 1e-6, seed)


@pytest.mark.parametrize("tiles", [(2048, 2048), (16, 16)], ids=str)
def test_large_logits_do_not_overflow(monkeypatch, tiles):
    monkeypatch.setattr(attention, "QUERY_TILE", tiles[0])
    monkeypatch.setattr(attention, "KEY_TILE", tiles[1])
    seed = new_seed()
    q, k, v = random_inputs(seed, (1, 40, 50, 2, 32), spread=100.0)
    out, lse = query_sparse_attention(q, k, v)
    expected, expected_lse = by_hand(q, k, v)
    # A logit of some hundreds is itself rounded by 1e-5 in float32.
    assert_close(out, expected, 3e-4, seed)
    assert_close(lse, expected_lse, 1e-6, seed)


@pytest.mark.parametrize("scale", [0.05, 1.0])
def test_scale(scale):
    seed = new_seed()
    q, k, v = random_inputs(seed, (1, 5, 11, 2, 8))
    out, lse = query_sparse_attention(q, k, v, scale=scale)
    expected, expected_lse = by_hand(q, k, v, scale)
    assert_close(out, expected, 2e-6, seed)
    assert_close(lse, expected_lse, 2e-6, seed)


@pytest.mark.parametrize("tiles", [(2048, 2048), (16, 24)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_half_precision(monkeypatch, tiles, dtype):
    monkeypatch.setattr(attention, "QUERY_TILE", tiles[0])
    monkeypatch.setattr(attention, "KEY_TILE", tiles[1])
    seed = new_seed()
    q, k, v = random_inputs(seed, (2, 33, 70, 2, 72), dtype)
    out, lse = query_sparse_attention(q, k, v, scale=0.1)  # 72 ** -0.5 too is no power of two
    assert out.dtype == dtype and lse.dtype == jnp.float32
    expected, expected_lse = by_hand(q, k, v, 0.1)
    assert_rounded(out, expected, q, k, v, seed, 0.1)
    assert_close(lse, expected_lse, 1e-5, seed)


def test_count_masks_the_rows_past_it():
    seed = new_seed()
    q, k, v = random_inputs(seed, (3, 9, 21, 2, 16))
    count = jnp.array([0, 1, 9], jnp.int32)
    out, lse = jax.jit(lambda count: query_sparse_attention(q, k, v, count=count))(count)
    expected, expected_lse = by_hand(q, k, v)
    for row, used in enumerate((0, 1, 9)):
        assert not np.asarray(out[row, used:]).any()
        assert (np.asarray(lse[row, :, used:]) == -np.inf).all()
        assert np.isfinite(np.asarray(lse[row, :, :used])).all()
        if used:
            assert_close(out[row, :used], expected[row, :used], 1e-6, seed, v)
            assert_close(lse[row, :, :used], expected_lse[row, :, :used], 1e-6, seed)


@pytest.mark.parametrize("tiles", [(2048, 2048), (16, 24)], ids=str)
def test_selected_rows_are_the_rows_of_dense_attention(monkeypatch, tiles):
    monkeypatch.setattr(attention, "QUERY_TILE", tiles[0])
    monkeypatch.setattr(attention, "KEY_TILE", tiles[1])
    seed = new_seed()
    q, k, v = random_inputs(seed, (2, 120, 120, 2, 24))
    rng = np.random.default_rng(seed)
    indices = jnp.asarray(np.stack([rng.permutation(120)[:37] for _ in range(2)]))
    dense, dense_lse = query_sparse_attention(q, k, v)
    out, lse = query_sparse_attention(gather_rows(q, indices), k, v)
    assert_close(out, np.asarray(gather_rows(dense, indices)), 1e-6, seed, v)
    rows = np.take_along_axis(np.asarray(dense_lse), np.asarray(indices)[:, None], axis=2)
    assert_close(lse, rows, 1e-6, seed)


def test_no_score_matrix_at_full_size():
    # One head of Wan 2.1 at 720p, 81 frames, a tenth of the tokens: scores would take 2.3 GB.
    queries, keys = 7_560, 75_600
    shapes = [jax.ShapeDtypeStruct((1, n, 1, 128), jnp.bfloat16) for n in (queries, keys, keys)]
    compiled = jax.jit(query_sparse_attention).lower(*shapes).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    assert memory < queries * keys * 4 / 10, f"{memory / 2**20:.0f} MiB"


def test_gather_clips_and_scatter_drops():
    values = jnp.arange(24.0).reshape(2, 6, 2)
    indices = jnp.array([[5, 0, 6], [2, 7, 1]])
    rows = np.asarray(gather_rows(values, indices))
    expected = np.stack([np.asarray(values)[0, [5, 0, 5]], np.asarray(values)[1, [2, 5, 1]]])
    assert np.array_equal(rows, expected)
    put = np.asarray(scatter_rows(values, indices, -jnp.ones((2, 3, 2))))
    expected = np.array(values)
    expected[0, [5, 0]] = -1
    expected[1, [2, 1]] = -1
    assert np.array_equal(put, expected)
    # The same for values with no trailing axes.
    lse = jnp.arange(12.0).reshape(2, 6)
    assert np.array_equal(gather_rows(lse, indices)[0], [5, 0, 5])
    back = scatter_rows(lse, indices, gather_rows(lse, indices))
    assert np.array_equal(back, lse)


def test_implementations_are_named():
    named = attention.implementations()
    assert named["xla"] == "runs"
    assert all(named.values())


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        ((2, 3, 8), (2, 5, 1, 8), (2, 5, 1, 8), r"expected q \[B,K,A,C\] .* got q \(2, 3, 8\)"),
        ((2, 3, 1, 8), (2, 5, 1, 8), (2, 6, 1, 8), "of one shape; got"),
        ((2, 3, 1, 8), (1, 5, 1, 8), (1, 5, 1, 8), "agree in batch, heads and head width"),
        ((2, 3, 2, 8), (2, 5, 1, 8), (2, 5, 1, 8), "agree in batch, heads and head width"),
        ((2, 3, 1, 8), (2, 5, 1, 4), (2, 5, 1, 4), "agree in batch, heads and head width"),
        ((2, 3, 1, 8), (2, 0, 1, 8), (2, 0, 1, 8), "at least one query and one key; got 3 and 0"),
        ((2, 0, 1, 8), (2, 5, 1, 8), (2, 5, 1, 8), "at least one query and one key; got 0 and 5"),
    ],
)
def test_wrong_shapes_are_refused(as_a_user, q, k, v, message):
    with pytest.raises(ValueError, match=message):
        query_sparse_attention(*map(jnp.zeros, (q, k, v)))


def test_wrong_dtype_count_and_implementation_are_refused(as_a_user):
    q, k, v = random_inputs(0, (2, 3, 5, 1, 8))
    with pytest.raises(ValueError, match="one dtype; got q bfloat16, k float32, v float32"):
        query_sparse_attention(q.astype(jnp.bfloat16), k, v)
    with pytest.raises(ValueError, match=r"expected count of shape \(2,\); got \(3,\)"):
        query_sparse_attention(q, k, v, count=jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match=r"implementation must be None or one of .*xla.* 'magic'"):
        query_sparse_attention(q, k, v, implementation="magic")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
