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
from astraea_jax.model import EntryNorm, Rows

pytestmark = pytest.mark.core

BLOCKS, BATCH, TOKENS, WIDTH = 3, 2, 37, 48


def case(seed, dtype, count, padding=3):
    """What left a block, its rows' positions (each batch row's own, some past the end), a norm."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    order = np.stack([rng.permutation(TOKENS)[:count] for _ in range(BATCH)])
    past = np.full((BATCH, padding), TOKENS)
    indices = jnp.asarray(np.concatenate([order, past], axis=1), jnp.int32)
    scale, shift = (jnp.asarray(rng.normal(size=(BATCH, 1, WIDTH)), jnp.float32) for _ in "ab")
    tokens, stack = normal(BATCH, TOKENS, WIDTH), normal(BLOCKS, BATCH, TOKENS, WIDTH)
    rows, kept = (normal(BATCH, count + padding, WIDTH) for _ in "ab")
    return (
        entry.Leaving(tokens, stack, rows, kept), indices,
        EntryNorm(scale, shift, 1e-6, jnp.dtype(dtype)),
    )  # fmt: skip


def by_hand(left, indices, index, residual=True):
    """The cache and the tokens that enter a block, one by one."""
    merged, stack = np.array(left.tokens), np.array(left.stack)
    if index:
        merged = merged + stack[index - 1] if residual else np.array(stack[index - 1])
    for batch, places in enumerate(np.asarray(indices)):
        for number, place in enumerate(places):
            if place < TOKENS:
                merged[batch, place] = left.rows[batch, number]
                if index:
                    stack[index - 1, batch, place] = left.cached[batch, number]
    return stack, merged


def assert_near(got, expected):
    """To the last bit but one of bfloat16, or 1e-5."""
    within = 2**-7 if got.dtype == jnp.bfloat16 else 1e-5
    got, expected = np.asarray(got, np.float32), np.asarray(expected, np.float32)
    np.testing.assert_allclose(got, expected, rtol=within, atol=within)


@pytest.mark.parametrize("index", [0, 1, BLOCKS])
@pytest.mark.parametrize("residual", [True, False])
def test_merged(index, residual):
    left, indices, _ = case(new_seed(), jnp.float32, 11)
    merged = jax.jit(functools.partial(entry.merged, residual=residual))
    got = merged(left, indices, jnp.int32(index))
    stack, tokens = by_hand(left, indices, index, residual)
    assert np.array_equal(got.stack, stack) and np.array_equal(got.tokens, tokens)
    assert got.normed is got.normed_rows is None


def test_slots():
    slots = entry.slots_of(jnp.array([[2, 0, 4, 4], [3, 1, 0, 4]]), 4)
    assert np.array_equal(slots[:, :4], [[1, -1, 0, -1], [2, 1, -1, 0]])
    assert np.array_equal(slots[:, 4:], [[0, 1, 2, 3]] * 2)
    assert entry.slots_of(jnp.zeros((1, 20), jnp.int32), 40)[0, 40:].tolist() == [*range(12, 20)]


@pytest.mark.parametrize("count", [0, 11, TOKENS])
@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kernel(dtype, index, count):
    left, indices, norm = case(new_seed(), dtype, count)
    got = jax.jit(interpreted)(left, indices, jnp.int32(index), norm.scale, norm.shift)
    assert {each.dtype for each in got} == {jnp.dtype(dtype)}
    stack, tokens = by_hand(left, indices, index)
    assert np.array_equal(got.stack, stack)
    fresh = np.asarray(entry.slots_of(indices, TOKENS))[:, :TOKENS, None] >= 0
    assert np.array_equal(got.tokens, np.where(fresh, left.tokens, tokens))
    assert_near(got.normed, norm(Rows(jnp.asarray(tokens))))
    assert_near(got.normed_rows, norm(Rows(left.rows)))


def interpreted(left, indices, index, scale, shift):
    """The kernel on a CPU."""
    arrays = left.tokens, left.rows, left.cached, entry.slots_of(indices, TOKENS), left.stack
    got = entering.enter(*arrays, index, scale, shift, eps=1e-6, interpret=True)
    return entry.Entered(*got)


def test_kernel_under_vmap():
    pairs = [case(new_seed(), jnp.float32, 11) for _ in range(2)]
    operands = [(left, indices, norm.scale, norm.shift) for left, indices, norm in pairs]
    got = jax.vmap(lambda left, indices, *norm: interpreted(left, indices, jnp.int32(2), *norm))(
        *jax.tree.map(lambda *leaves: jnp.stack(leaves), *operands)
    )
    for lane, (left, indices, norm) in enumerate(pairs):
        stack, tokens = by_hand(left, indices, 2)
        assert np.array_equal(got.stack[lane], stack)
        assert got.normed is not None
        assert_near(got.normed[lane], norm(Rows(jnp.asarray(tokens))))


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
    left, indices, norm = case(new_seed(), jnp.bfloat16, 11)
    enter = functools.partial(entry.enter_block, index=jnp.int32(2), norm=norm, residual=True)
    operands = left, indices, entry.slots_of(indices, TOKENS)
    plain = jax.jit(enter)(*operands)
    assert plain.normed is plain.normed_rows is None  # norming is then the block's own
    with with_gpu():
        traced = jax.jit(lambda *arrays: enter(*arrays)).trace(*operands)
        assert "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()
        here = traced.lower(lowering_platforms=("cpu",))
        assert "triton" not in here.as_text()
        got = here.compile()(*operands)
    assert np.array_equal(got.stack, plain.stack) and np.array_equal(got.tokens, plain.tokens)
    assert_near(got.normed, norm(Rows(plain.tokens)))
    assert_near(got.normed_rows, norm(Rows(left.rows)))


def test_where_the_kernel_does_not_fit():
    left, _, norm = case(0, jnp.bfloat16, 11)
    assert not entry._one_pass(norm, left)
    with with_gpu("Tesla T4"):
        assert not entry._one_pass(norm, left)
    with with_gpu():
        assert entry._one_pass(norm, left)
        assert not entry._one_pass(norm, left._replace(stack=left.stack.astype(jnp.float32)))
        wide = jax.ShapeDtypeStruct((BATCH, TOKENS, 136), jnp.bfloat16)
        assert not entry._one_pass(norm, left._replace(tokens=wide))


def sparse_step(level):
    """What a step computes after a dense one, at other latents; levels are known."""
    model, inputs, method = small_model(), small_inputs(), Astraea()
    latents = jnp.concatenate([inputs.latents] * 2)
    geometry = model.geometry(latents.shape)
    prepared = model.prepare(inputs.context, geometry)

    def step(mode, latents, state):
        given = base.StepInputs(
            latents, jnp.full(2, 500.0), *map(jnp.int32, (mode.level, 1)), jax.random.key(0)
        )
        evaluation = base.Evaluation(model, prepared, geometry, 2, jnp.int32(2))
        return method.forward(mode, evaluation, given, state)

    @jax.jit
    def both(latents):
        state = method.init(geometry, 2, model.cache_dtype)
        state = step(base.DENSE, latents, state).state
        return step(method.static_mode(level), latents + 0.1 * latents**2, state)

    return both(latents)


@pytest.fixture
def with_the_kernel(monkeypatch):
    """Entries run the kernel, interpreted; how often it was traced."""
    on_a_cpu = functools.partial(entering.enter, interpret=True)
    calls = []

    def enter(*arrays, **rest):
        calls.append(rest)
        return on_a_cpu(*arrays, **rest)

    monkeypatch.setattr(entering, "enter", enter)
    monkeypatch.setattr(entry, "_one_pass", lambda *_: True)
    monkeypatch.setattr(
        entry.lax, "platform_dependent", lambda *operands, cuda, default: cuda(*operands)
    )
    return calls


@pytest.mark.slow
def test_a_step_with_the_kernel_is_a_step_without(request):
    plain = sparse_step(3)
    calls = request.getfixturevalue("with_the_kernel")
    fused = sparse_step(3)
    assert len(calls) == 1  # the scan's body
    for got, expected in zip(jax.tree.leaves(fused), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("fully_optimised")
def test_gradients_with_the_kernel(with_the_kernel):
    left, indices, norm = case(new_seed(), jnp.float32, 11)
    places = indices, entry.slots_of(indices, TOKENS), jnp.int32(2)

    def loss(enter, left, scale, shift):
        got = enter(left, norm._replace(scale=scale, shift=shift))
        parts = got.stack, got.normed, got.normed_rows
        return sum(jnp.sum(jnp.sin(part + number)) for number, part in enumerate(parts))

    def plain(left, norm):
        got = entry.merged(left, indices, places[2], residual=True)
        return got._replace(normed=norm(Rows(got.tokens)), normed_rows=norm(Rows(left.rows)))

    def fused(left, norm):
        return entry.enter_block(left, *places, norm, residual=True)

    of = functools.partial(jax.grad, argnums=(1, 2, 3))
    got, expected = (of(loss)(enter, left, norm.scale, norm.shift) for enter in (fused, plain))
    assert with_the_kernel
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
