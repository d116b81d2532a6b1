"""The token cache: shapes, one block written at a time, indices past the tokens dropped."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from astraea_jax import cache as token_cache

pytestmark = pytest.mark.core


def empty(dtype=jnp.float32):
    return token_cache.empty_cache(
        blocks=3, batch=2, tokens=10, width=4, dtype=jnp.dtype(dtype), selections=1,
        references=3, reference_width=5, reference_dtype=jnp.dtype(jnp.float32),
    )  # fmt: skip


def random_stack(seed=0):
    return jax.random.normal(jax.random.key(seed), (3, 2, 10, 4))


def test_empty_cache_is_zeros_of_the_documented_shapes():
    cache = empty(jnp.bfloat16)
    assert cache.out.shape == (3, 2, 10, 4) and cache.out.dtype == jnp.bfloat16
    assert cache.lse.shape == (1, 2, 10) and cache.lse.dtype == jnp.float32
    assert cache.age.shape == (1, 2, 10) and cache.age.dtype == jnp.int8
    assert cache.reference.shape == (3, 2, 10, 5) and cache.reference.dtype == jnp.float32
    assert all(not np.asarray(leaf, np.float32).any() for leaf in cache)


def test_num_bytes():
    for dtype, size in ((jnp.float32, 4), (jnp.bfloat16, 2)):
        expected = 3 * 2 * 10 * 4 * size + 20 * 4 + 20 + 3 * 2 * 10 * 5 * 4
        assert token_cache.num_bytes(empty(dtype)) == expected
    shapes = jax.eval_shape(empty)
    assert token_cache.num_bytes(shapes) == token_cache.num_bytes(empty())


@pytest.mark.parametrize("block", [0, 2])
def test_write_rows_touches_one_block_and_drops_indices_past_the_end(block):
    stack = random_stack()
    indices = jnp.array([[7, 0, 10, 11], [10, 11, 9, 3]])
    rows = jax.random.normal(jax.random.key(1), (2, 4, 4))
    got = np.asarray(jax.jit(token_cache.write_rows)(stack, jnp.int32(block), indices, rows))
    expected = np.array(stack)
    expected[block, 0, [7, 0]] = rows[0, :2]
    expected[block, 1, [9, 3]] = rows[1, 2:]
    assert np.array_equal(got, expected)


def test_write_rows_rounds_to_the_cache():
    stack = random_stack().astype(jnp.bfloat16)
    rows = jnp.full((2, 1, 4), 1 + 2**-12)
    got = token_cache.write_rows(stack, jnp.int32(1), jnp.array([[4], [5]]), rows)
    assert got.dtype == jnp.bfloat16
    assert np.array_equal(np.asarray(got[1, 0, 4], np.float32), np.ones(4))


@pytest.mark.parametrize("block", [0, 1, 2])
def test_read_block_gives_what_is_there(block):
    stack = random_stack()
    after, rows = jax.jit(token_cache.read_block)(stack, jnp.int32(block))
    assert np.array_equal(after, stack) and np.array_equal(rows, stack[block])


def test_read_comes_before_the_write():
    @jax.jit
    def swap(stack, rows):
        stack, old = token_cache.read_block(stack, jnp.int32(1))
        return token_cache.write_block(stack, jnp.int32(1), rows), old

    stack, rows = random_stack(), jnp.ones((2, 10, 4))
    after, old = swap(stack, rows)
    assert np.array_equal(old, stack[1]) and np.array_equal(after[1], rows)
    assert np.array_equal(after[0], stack[0]) and np.array_equal(after[2], stack[2])


def test_write_block_casts_and_serves_every_rank():
    age = token_cache.write_block(jnp.zeros((3, 2, 10), jnp.int8), 2, jnp.full((2, 10), 7.0))
    assert age.dtype == jnp.int8 and (np.asarray(age[2]) == 7).all()
    assert not np.asarray(age[:2]).any()


def test_a_donated_cache_is_written_in_place():
    def step(stack, indices, rows):
        def layer(block, stack):
            stack, old = token_cache.read_block(stack, block)
            return token_cache.write_rows(stack, block, indices, rows + old[:, :3])

        return jax.lax.fori_loop(0, 64, layer, stack)

    shapes = (
        jax.ShapeDtypeStruct((64, 2, 100, 32), jnp.float32),
        jax.ShapeDtypeStruct((2, 3), jnp.int32),
        jax.ShapeDtypeStruct((2, 3, 32), jnp.float32),
    )
    compiled = jax.jit(step, donate_argnums=0).lower(*shapes).compile()
    memory, size = compiled.memory_analysis(), 64 * 2 * 100 * 32 * 4
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 4, "the whole cache was copied"


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
