"""How tokens enter a block: merged by hand, the kernel under the interpreter, where it runs."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import new_seed
from helpers import small_inputs, small_model
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from astraea_jax import entry
from astraea_jax.kernels import entering
from astraea_jax.methods import Astraea, base
from astraea_jax.model import EntryNorm

pytestmark = pytest.mark.core

BLOCKS, BATCH, TOKENS, WIDTH = 3, 2, 37, 48


def case(seed, dtype, count, padding=3):
    """Tokens, rows, their indices (each batch row's own, some past the tokens), cache and norm."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    order = np.stack([rng.permutation(TOKENS)[:count] for _ in range(BATCH)])
    past = np.full((BATCH, padding), TOKENS)
    indices = jnp.asarray(np.concatenate([order, past], axis=1), jnp.int32)
    scale, shift = (jnp.asarray(rng.normal(size=(BATCH, 1, WIDTH)), jnp.float32) for _ in "ab")
    return (
        normal(BATCH, TOKENS, WIDTH), normal(BATCH, count + padding, WIDTH), indices,
        normal(BLOCKS, BATCH, TOKENS, WIDTH), EntryNorm(scale, shift, 1e-6, jnp.dtype(dtype)),
    )  # fmt: skip


def by_hand(tokens, rows, indices, stack, index, residual=True):
    """The tokens that enter a block, one by one."""
    merged = np.array(tokens)
    if index:
        cached = np.asarray(stack)[index - 1]
        merged = merged + cached if residual else np.array(cached)
    for batch, places in enumerate(np.asarray(indices)):
        for place, row in zip(places, np.asarray(rows)[batch], strict=True):
            if place < TOKENS:
                merged[batch, place] = row
    return merged


@pytest.mark.parametrize("index", [0, 1, BLOCKS])
@pytest.mark.parametrize("residual", [True, False])
def test_merged(index, residual):
    tokens, rows, indices, stack, _ = case(new_seed(), jnp.float32, 11)
    merged = jax.jit(functools.partial(entry.merged, residual=residual))
    after, got = merged(tokens, rows, indices, stack, jnp.int32(index))
    assert np.array_equal(after, stack)
    assert np.array_equal(got, by_hand(tokens, rows, indices, stack, index, residual))


def test_slots():
    slots = entry.slots_of(jnp.array([[2, 0, 4, 4], [3, 1, 0, 4]]), 4)
    assert np.array_equal(slots, [[1, -1, 0, -1], [2, 1, -1, 0]])


@pytest.mark.parametrize("count", [0, 11, TOKENS])
@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize(("dtype", "within"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2**-7)], ids=str)
def test_kernel(dtype, within, index, count):
    tokens, rows, indices, stack, norm = case(new_seed(), dtype, count)
    slots = entry.slots_of(indices, TOKENS)
    enter = functools.partial(entering.enter, eps=norm.eps, interpret=True)
    got, normed = jax.jit(enter)(
        tokens, rows, slots, stack, jnp.int32(index), norm.scale, norm.shift
    )
    assert got.dtype == normed.dtype == dtype
    assert np.array_equal(got, by_hand(tokens, rows, indices, stack, index))
    expected = np.asarray(norm(got), np.float32)
    np.testing.assert_allclose(np.asarray(normed, np.float32), expected, rtol=within, atol=within)


def test_kernel_under_vmap():
    pairs = [case(new_seed(), jnp.float32, 11) for _ in range(2)]

    def enter(tokens, rows, indices, stack, norm):
        slots = entry.slots_of(indices, TOKENS)
        return entering.enter(
            tokens, rows, slots, stack, jnp.int32(2), *norm, eps=1e-6, interpret=True
        )

    operands = [(*operands, norm[:2]) for *operands, norm in pairs]
    got, _ = jax.vmap(enter)(*jax.tree.map(lambda *leaves: jnp.stack(leaves), *operands))
    for lane, (tokens, rows, indices, stack, _) in zip(got, pairs, strict=True):
        assert np.array_equal(lane, by_hand(tokens, rows, indices, stack, 2))


@pytest.mark.parametrize(
    ("width", "part"), [(1536, 512), (5120, 1024), (192, 64), (3072, 1024), (136, None)]
)
def test_parts_cover_the_width(width, part):
    assert entering.part_width(width) == part


def with_gpu(name="NVIDIA H100 80GB HBM3"):
    """Traces for a named GPU."""
    device = AbstractDevice(device_kind=name, num_cores=132, platform="gpu")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def test_the_platform_is_chosen_at_lowering():
    tokens, rows, indices, stack, norm = case(new_seed(), jnp.bfloat16, 11)
    slots, index = entry.slots_of(indices, TOKENS), jnp.int32(2)

    enter = functools.partial(entry.enter_block, index=index, norm=norm, residual=True)

    operands = tokens, rows, indices, slots, stack
    _, plain, normed = jax.jit(enter)(*operands)
    assert normed is None  # norming is then the block's own
    with with_gpu():
        traced = jax.jit(lambda *arrays: enter(*arrays)).trace(*operands)
        assert "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()
        here = traced.lower(lowering_platforms=("cpu",))
        assert "triton" not in here.as_text()
        _, got, normed = here.compile()(*operands)
    assert np.array_equal(got, plain) and np.array_equal(normed, norm(plain))


def test_where_the_kernel_does_not_fit():
    tokens, rows, _, stack, norm = case(0, jnp.bfloat16, 11)
    assert not entry._one_pass(norm, tokens, rows, stack)
    with with_gpu("Tesla T4"):
        assert not entry._one_pass(norm, tokens, rows, stack)
    with with_gpu():
        assert entry._one_pass(norm, tokens, rows, stack)
        assert not entry._one_pass(norm, tokens.astype(jnp.float32), rows, stack)
        wide = jax.ShapeDtypeStruct((BATCH, TOKENS, 136), jnp.bfloat16)
        assert not entry._one_pass(norm, wide, rows, stack)


def sparse_step(level):
    """What a step computes after a dense one, at other latents; levels are known."""
    model, inputs, method = small_model(), small_inputs(), Astraea()
    latents = jnp.concatenate([inputs.latents] * 2)
    geometry = model.geometry(latents.shape)
    prepared = model.prepare(inputs.context, geometry)

    def step(mode, latents, state):
        given = base.StepInputs(
            latents, jnp.full(2, 500.0), jnp.int32(mode.level), jax.random.key(0)
        )
        return method.forward(mode, model, prepared, geometry, given, state, 2)

    @jax.jit
    def both(latents):
        state = method.init(geometry, 2, model.cache_dtype)
        state = step(base.DENSE, latents, state).state
        return step(method.static_mode(level), latents + 0.1 * latents**2, state)

    return both(latents)


@pytest.mark.parametrize("level", [3, 8])
def test_a_step_with_the_kernel_is_a_step_without(monkeypatch, level):
    plain = sparse_step(level)
    interpreted = functools.partial(entering.enter, interpret=True)
    calls = []

    def enter(*arrays, **rest):
        calls.append(rest)
        return interpreted(*arrays, **rest)

    monkeypatch.setattr(entering, "enter", enter)
    monkeypatch.setattr(entry, "_one_pass", lambda *_: True)
    monkeypatch.setattr(
        entry.lax, "platform_dependent", lambda *operands, cuda, default: cuda(*operands)
    )
    fused = sparse_step(level)
    assert len(calls) == 1  # the scan's body
    for got, expected in zip(jax.tree.leaves(fused), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
