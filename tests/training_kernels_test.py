"""The kernels of a training step against the passes that XLA compiles, forwards and backwards."""

import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import slow_but

from astraea_ports.wan.block import Rope
from astraea_ports.wan.config import TransformerConfig
from astraea_ports.wan.training import forward, kernels, passes
from astraea_ports.wan.transformer import Transformer

EPS = 1e-6
SHAPES = [(2, 50, 16), (1, 5, 48)]
"""Several programs with unlike numbers of tokens; a width that is no power of two."""

interpreted = types.SimpleNamespace(
    **{
        name: functools.partial(getattr(kernels, name), interpret=True)
        for name in ("enter", "add", "heads")
    }
)


def draw(*shapes, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(7), len(shapes))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def rope_of(num_tokens, half):
    angles = jnp.arange(num_tokens)[:, None] * jnp.linspace(1.0, 0.1, half)
    return Rope(jnp.cos(angles), jnp.sin(angles))


def compare(call, arguments, limit=1e-5):
    """What `call` makes with either, and its gradients, each to so much of its largest."""
    results = []
    for between in (interpreted, passes):
        value, pull = jax.vjp(lambda *given, b=between: call(b, *given), *arguments)
        along = draw(*(leaf.shape for leaf in jax.tree.leaves(value)))
        along = [a.astype(v.dtype) for a, v in zip(along, jax.tree.leaves(value), strict=True)]
        gradients = pull(jax.tree.unflatten(jax.tree.structure(value), along))
        results.append(jax.tree.leaves((value, gradients)))
    for got, expected in zip(*results, strict=True):
        assert got.shape == expected.shape and got.dtype == expected.dtype
        got, expected = (np.asarray(each, np.float32) for each in (got, expected))
        np.testing.assert_allclose(got, expected, atol=limit * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("shape", slow_but(SHAPES[1:], SHAPES))
def test_tokens_enter_a_sub_layer(shape):
    batch, _, width = shape
    arguments = draw(shape, (batch, 1, width), (batch, 1, width))
    compare(lambda between, *given: between.enter(*given, EPS), arguments)


@pytest.mark.parametrize("shape", slow_but(SHAPES[1:], SHAPES))
@pytest.mark.parametrize("dtype", slow_but({"bfloat16"}, ["float32", "bfloat16"]))
def test_what_a_sub_layer_made_is_added(shape, dtype):
    batch, _, width = shape
    row = (batch, 1, width)
    tokens, out, bias = draw(shape, shape, (width,), dtype=dtype)
    gate, scale, shift = draw(row, row, row)
    limit = 1e-5 if dtype == "float32" else 2e-2  # roundings of results, and of sums of them
    compare(
        lambda between, *given: between.add(*given, EPS),
        (tokens, gate, out, bias, scale, shift),
        limit,
    )


@pytest.mark.parametrize("shape", slow_but(SHAPES[:1], SHAPES))
@pytest.mark.parametrize(
    ("parts", "normed", "turns", "dtype"),
    [
        (3, 2, True, "float32"),
        pytest.param(2, 1, False, "float32", marks=pytest.mark.slow),
        pytest.param(2, 1, False, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_projections_become_heads(shape, parts, normed, turns, dtype):
    batch, num_tokens, width = shape
    rope = rope_of(num_tokens, width // 4) if turns else None
    shapes = (batch, num_tokens, parts * width), (parts * width,), (normed, width)
    limit = 1e-5 if dtype == "float32" else 1e-2
    arguments = draw(*shapes, dtype=dtype)
    compare(lambda between, *given: between.heads(*given, rope, EPS), arguments, limit)


@pytest.mark.slow
def test_a_model_trained_by_kernels_is_the_same(monkeypatch):
    config = TransformerConfig(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=16,
        out_channels=16,
        text_dim=8,
        freq_dim=8,
        ffn_dim=24,
        num_layers=1,
    )
    model = Transformer(config, nnx.Rngs(0))
    leaves, tree = jax.tree.flatten(model)  # none is left at its start's zero or one
    more = draw(*(leaf.shape for leaf in leaves))
    model = jax.tree.unflatten(tree, [x + 0.1 * y for x, y in zip(leaves, more, strict=True)])
    latents, context = draw((1, 2, 4, 4, 16), (1, 3, 8))
    time = jnp.array([300.0])
    monkeypatch.setattr(forward, "kernels", interpreted)
    results = []
    for between in ("xla", "triton"):
        layout = forward.Layout(passes=between)

        def loss(model, layout=layout):
            out = forward.velocity(model, latents, time, context, layout)
            return jnp.square(out).sum()

        results.append(jax.jit(jax.value_and_grad(loss))(model))
    for got, expected in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-4 * float(jnp.abs(expected).max() + 1e-3))


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
