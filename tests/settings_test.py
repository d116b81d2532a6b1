"""JAX's own settings, as another program may have them: no dtype is left to them."""

import ast
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_inputs, small_model
from small_wan import write_small_wan

from astraea_jax import solvers
from astraea_jax.denoise import denoise
from astraea_jax.methods import METHODS, Astraea, StepLevel
from astraea_jax.population import scorer
from astraea_jax.schedule import Schedule
from astraea_ports import wan

ROOT = pathlib.Path(__file__).resolve().parents[1]

DRAWS = {"normal": 2, "uniform": 2, "truncated_normal": 4, "exponential": 2, "gumbel": 2}
DRAWS |= {"randint": 4}
MADE = {
    "arange": 3,
    "zeros": 1,
    "ones": 1,
    "empty": 1,
    "full": 2,
    "eye": 3,
    "identity": 1,
    "linspace": 5,
}
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
        ("jnp.arange(3) + jnp.arange(3, dtype=jnp.int32)", 1),
    ],
)
def test_calls_without_a_dtype_are_seen(source, number):
    assert len(list(without_a_dtype(source))) == number


STRICT = {
    "jax_enable_x64": True,
    "jax_numpy_rank_promotion": "raise",
    "jax_numpy_dtype_promotion": "strict",
}


@pytest.fixture
def strict():
    """JAX at its strictest, for a test; the model and its inputs are made before."""
    made = small_model(), small_inputs()
    before = {name: jax.config.values[name] for name in STRICT}
    for values in (STRICT, before):
        for name, value in values.items():
            jax.config.update(name, value)
        if values is STRICT:
            yield made


def traced(function, *arguments) -> None:
    """Traces a program, in which no array may have a dtype that nobody named."""
    text = str(jax.make_jaxpr(function)(*arguments))
    wide = set(re.findall(r"\w+:(f64\[[^\]]+\])", text))
    assert not wide, f"float64 arrays: {sorted(wide)}"


def trace_a_run(model, inputs, name, driver):
    levels = (10, 0, 10) if name.startswith("step") else (10, 0, 5)

    def run(latents, context):
        return denoise(
            model, latents, context, solver=solvers.unipc(3), schedule=Schedule(levels),
            method=METHODS[name], guidance=3.0, driver=driver,
        )  # fmt: skip

    traced(run, *inputs)


def test_runs_are_traced_with_x64_and_without_promotion(strict):
    for driver in ("dynamic", "static"):
        trace_a_run(*strict, "astraea", driver)


@pytest.mark.slow
def test_all_other_parts_are_traced_with_x64_and_without_promotion(strict):
    model, inputs = strict
    for name in ("astraea-published", "step-level-corrected"):
        for driver in ("dynamic", "static"):
            trace_a_run(model, inputs, name, driver)
    pipeline = wan.Pipeline.from_pretrained()
    traced(pipeline.vae.decode, jnp.zeros((1, 2, 4, 4, 16), jnp.float32))
    traced(pipeline.vae.encode, jnp.zeros((1, 5, 32, 32, 3), jnp.float32))
    tokens = jnp.ones((1, 4), jnp.int32)
    traced(pipeline.text_encoder, tokens, tokens)
    levels = jnp.full((2, 3), 10, jnp.int8)
    for plan, method in (("lanes", StepLevel()), ("map", Astraea(traced_level="loop"))):
        many = scorer.Scorer(
            model, *inputs, solver=solvers.unipc(3), method=method, guidance=3.0, plan=plan
        )._many
        traced(lambda levels, many=many: many(levels), levels)


SETTINGS = {
    "strict": STRICT,
    "guard": {"jax_transfer_guard": "disallow"},
    "leaks": {"jax_check_tracer_leaks": True},
    "no jit": {"jax_disable_jit": True},
}
"""What a small model is run under, each in a process of its own."""

CASES = [(driver, levels) for driver in ("static", "dynamic") for levels in ((10, 10), (10, 5))]
ONE_STEP = [("static", (10,))]

PROGRAM = """
import json, sys
import jax, numpy as np
model, target, settings, cases = *sys.argv[1:3], *map(json.loads, sys.argv[3:])
for name, value in settings.items():
    jax.config.update(name, value)
from astraea_jax.methods import Astraea
from astraea_jax.schedule import Schedule
from astraea_ports import wan

pipeline, results = wan.Pipeline.from_pretrained(model), {}
for driver, levels in cases:
    made = pipeline(
        "a red circle moving left over a blue background", frames=5, height=32, width=32,
        steps=len(levels), driver=driver, method=Astraea(), schedule=Schedule(tuple(levels)),
    )
    name = f"{driver} {levels}"
    results[f"{name} latents"], results[f"{name} video"] = map(
        np.asarray, jax.device_get((made.latents, made.video))
    )
np.savez(target, **results)
"""


def in_a_process(model, target, settings, cases):
    """Latents and videos of a model, made in a process where JAX is set so."""
    command = [sys.executable, "-c", PROGRAM, str(model), str(target)]
    command += [json.dumps(settings), json.dumps(cases)]
    # A program that no setting changes is compiled once.
    kept = {
        "JAX_COMPILATION_CACHE_DIR": str(model.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | kept)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(target))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings") / "model"
    folder.mkdir()
    return write_small_wan(folder)


@pytest.fixture(scope="module")
def as_jax_comes(model):
    return in_a_process(model, model.parent / "plain.npz", {}, CASES + ONE_STEP)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_a_small_model_makes_the_same_under_every_setting(name, model, as_jax_comes, tmp_path):
    # Without jit every operation compiles by itself: a step will do; and nothing is fused.
    jitted = name != "no jit"
    cases = CASES if jitted else ONE_STEP
    made = in_a_process(model, tmp_path / "made.npz", SETTINGS[name], cases)
    assert len(made) == (8 if jitted else 2)
    for which, value in made.items():
        expected = as_jax_comes[which]
        assert value.dtype == expected.dtype == np.float32
        bound = 0 if jitted else 1e-4 * np.abs(expected).max()
        np.testing.assert_allclose(value, expected, rtol=0, atol=bound, err_msg=which)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
