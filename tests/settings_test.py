"""JAX's own settings, as another program may have them: no dtype is left to them."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

DRAWS = {"normal": 2, "uniform": 2, "truncated_normal": 4, "exponential": 2, "gumbel": 2}
DRAWS |= {"randint": 4}
MADE = {"zeros": 1, "ones": 1, "empty": 1, "full": 2, "eye": 3, "identity": 1, "linspace": 5}
"""Functions whose dtype depends on x64, and where among the arguments it stands."""


def without_a_dtype(source: str):
    """Calls of `source` whose result is float32 or float64 (int32 or int64) as JAX is set."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner, name = ast.unparse(node.func.value), node.func.attr
        place = {"jax.random": DRAWS, "jnp": MADE}.get(owner, {}).get(name)
        named = any(keyword.arg == "dtype" for keyword in node.keywords)
        if place is not None and len(node.args) <= place and not named:
            yield f"line {node.lineno}: {ast.unparse(node)}"
        if (owner, name) == ("jax.random", "bernoulli"):
            share = [*node.args[1:2], *(k.value for k in node.keywords if k.arg == "p")]
            if not share or isinstance(share[0], ast.Constant):
                yield f"line {node.lineno}: {ast.unparse(node)}"


def test_every_array_that_is_made_or_drawn_names_its_dtype():
    # Bench is where its own process runs, with JAX as it comes.
    found = [
        f"{path.relative_to(ROOT)}, {call}"
        for folder in ("astraea_jax", "ports")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if "bench" not in path.parts
        for call in without_a_dtype(path.read_text())
    ]
    assert found == []


@pytest.mark.parametrize(
    ("source", "number"),
    [
        ("jnp.zeros(3)", 1),
        ("jnp.zeros(3, bool) + jnp.full((2,), 1.0, jnp.float32)", 0),
        ("jnp.full((2,), 1.0)", 1),
        ("jax.random.normal(key, (3,)) + jax.random.uniform(key)", 2),
        ("jax.random.normal(key, (3,), jnp.float32)", 0),
        ("jax.random.uniform(key, dtype=jnp.float32)", 0),
        ("jax.random.bernoulli(key) | jax.random.bernoulli(key, 0.5)", 2),
        ("jax.random.bernoulli(key, jnp.float32(0.5), (3,))", 0),
        ("jnp.zeros_like(x) + np.zeros(3)", 0),
    ],
)
def test_calls_without_a_dtype_are_seen(source, number):
    assert len(list(without_a_dtype(source))) == number


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
