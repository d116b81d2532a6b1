"""Methods: their names, modes and states, and what they refuse."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import pytest
from helpers import small_model

from astraea_jax import methods
from astraea_jax.methods import METHODS, Astraea, Dense, FixedToken, Method, StepLevel, base
from astraea_jax.model import Geometry, Groups, Kind, Stack
from astraea_jax.selection import PUBLISHED, SelectionConfig

SIGNALS = ("embedding", 24), ("projected", 144)
GEOMETRY = Geometry((3, 4, 5), 24, 16, (Stack(2, (Kind(),)),), SIGNALS)
BY_LEVEL = [name for name, method in METHODS.items() if method.by_level]


def test_make_gives_each_by_its_name():
    assert list(METHODS) == [
        "dense", "astraea", "astraea-corrected", "astraea-published", "fixed-token",
        "step-level", "step-level-corrected", "step-level-residual", "pab-2-6", "teacache-0.08",
    ]  # fmt: skip
    assert all(methods.make(name) is method for name, method in METHODS.items())
    assert methods.make("astraea-published") == Astraea(PUBLISHED)
    with pytest.raises(ValueError, match=r"method must be one of dense, .*; got 'asteria'"):
        methods.make("asteria")


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_a_hashable_value(name):
    method = METHODS[name]
    assert isinstance(method, Method)
    assert method == dataclasses.replace(method)
    assert hash(method) == hash(dataclasses.replace(method))
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.selection = None


def test_methods_differ():
    assert len(set(METHODS.values())) == len(METHODS)
    assert FixedToken() != Astraea(FixedToken().selection)


def test_a_method_is_called_as_the_registry_calls_it():
    assert {name: method.name for name, method in METHODS.items()} == {
        name: name for name in METHODS
    }


@pytest.mark.parametrize("name", BY_LEVEL)
def test_static_modes_agree_with_the_dynamic_choice(name):
    method = METHODS[name]
    evaluation = base.Evaluation(small_model(), (), GEOMETRY, 2, jnp.int32(4))
    state = method.init(GEOMETRY, 2, jnp.dtype(jnp.float32))
    levels = (0, 10) if isinstance(method, StepLevel) else range(11)
    for level in levels:
        inputs = base.StepInputs(
            jnp.zeros((2, 3, 8, 10, 4)),
            jnp.zeros(2),
            *map(jnp.int32, (level, 0)),
            jax.random.key(0),
        )
        mode = method.modes[int(method.decide(evaluation, inputs, state)[0])]
        static = method.static_mode(level)
        assert mode.kind == static.kind
        assert static.level in (level, 10 if isinstance(method, Dense) else level)
        hash(mode)


@pytest.mark.parametrize("reuse", ["velocity", "residual"])
@pytest.mark.parametrize("level", [1, 5, 9])
def test_step_level_does_whole_steps(reuse, level):
    with pytest.raises(
        ValueError, match=rf"{StepLevel(reuse).name} computes whole steps, .* for level {level}"
    ):
        StepLevel(reuse).static_mode(level)


def test_astraea_has_a_mode_for_each_level():
    modes = [Astraea().static_mode(level) for level in range(11)]
    assert modes[0] == base.SKIP and modes[10] == base.DENSE
    assert [mode.level for mode in modes] == list(range(11)) and len(set(modes)) == 11


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_state_is_as_large_as_documented(dtype):
    """Bytes by hand: B=2, N=60, H=24, P=16 and L=2."""
    dtype = jnp.dtype(dtype)
    tokens, size = 2 * 60, dtype.itemsize
    velocity = tokens * 16 * 4
    cases = {
        Dense(): 0,
        Astraea(): tokens * (2 * 24 * size + 5 + 24 * size) + velocity,
        Astraea(PUBLISHED): tokens * (2 * 24 * size + 2 * 5 + 24 * size) + velocity,
        Astraea(dataclasses.replace(PUBLISHED, reuse="residual")): (
            tokens * (2 * 24 * size + 2 * 5 + 2 * 24 * size) + velocity
        ),
        Astraea(SelectionConfig(scope="block", reference="sketch", sketch_width=3)): (
            tokens * (2 * 24 * size + 2 * 5 + 2 * 3 * 4) + velocity
        ),
        StepLevel(): velocity,
        StepLevel("residual"): tokens * 24 * size,
    }
    for method, expected in cases.items():
        state = jax.eval_shape(lambda method=method: method.init(GEOMETRY, 2, dtype))
        total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        assert total == expected, method


@pytest.mark.parametrize("name", METHODS)
def test_state_starts_as_zeros(name):
    state = METHODS[name].init(GEOMETRY, 2, jnp.dtype(jnp.float32))
    assert all(not leaf.any() for leaf in jax.tree.leaves(state))


FRAMES, POSITIONS = Groups(3), Groups(20, contiguous=False)


@pytest.mark.parametrize(
    ("kinds", "splits", "serving"),
    [
        ((Groups(),), (Groups(),), (0,)),
        ((FRAMES, Groups()), (FRAMES,), (0, 0)),
        ((Groups(), FRAMES), (FRAMES,), (0, 0)),
        ((FRAMES, POSITIONS), (FRAMES, POSITIONS), (0, 1)),
        ((Groups(), POSITIONS, FRAMES, POSITIONS), (POSITIONS, FRAMES), (1, 0, 1, 0)),
        # Frames of 20 tokens have 2 rows each at level 1, halves of them 1: as many in all.
        ((FRAMES, Groups(6)), (Groups(6),), (0, 0)),
        # Frames of 15 have 2 each and all 60 tokens 6: not as many in all.
        ((Groups(4), Groups()), (Groups(4), Groups()), (0, 1)),
    ],
)
def test_a_split_serves_the_kinds_that_it_gives_equal_rows(kinds, splits, serving):
    stack = Stack(2, tuple(Kind(str(i), groups) for i, groups in enumerate(kinds)))
    geometry = GEOMETRY._replace(stacks=(stack,))
    assert base.splits(geometry) == splits
    assert tuple(base.split_of(geometry, each) for each in kinds) == serving
    state = Astraea().init(geometry, 2, jnp.dtype(jnp.float32))
    assert state.cache.age.shape[0] == len(splits)


def test_fixed_token_selects_once_a_step():
    assert FixedToken().selection == dataclasses.replace(PUBLISHED, scope="step")
    with pytest.raises(ValueError, match=r"fixed-token needs scope \"step\"; got 'block'.*Astraea"):
        FixedToken(PUBLISHED)


def test_step_level_refuses_other_reuse(as_a_user):
    with pytest.raises(ValueError, match="reuse must be velocity or residual; got 'output'"):
        StepLevel("output")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
