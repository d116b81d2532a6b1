"""What several test files build on: a small random Wan and its inputs."""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx

from astraea_ports.wan.transformer import Transformer, TransformerConfig

FIXTURES = Path(__file__).parent / "fixtures"
LAYOUTS = ("diffusers", "original")


def slow_but(fast, values, *, core=()):
    """Parameters of a test, by name: those that are not among `fast` are slow."""
    return [
        pytest.param(
            value,
            id=str(value),
            marks=[pytest.mark.slow] * (value not in fast) + [pytest.mark.core] * (value in core),
        )
        for value in values
    ]


def full_size(part: str, layout: str, blocks: int = 1) -> dict[str, list[int]]:
    """Keys and shapes of a real checkpoint; those listed for block 0 are there for each block."""
    listed = json.loads((FIXTURES / "wan/keys_and_shapes.json").read_text())[part]
    keys = {}
    for original, (diffusers, shape) in listed.items():
        name = original if layout == "original" else diffusers
        for index in range(blocks):
            keys[name.replace(".0.", f".{index}.", 1) if "block" in name else name] = shape
    return keys


SMALL = TransformerConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=8,
    freq_dim=16,
    ffn_dim=48,
    num_layers=2,
)


@functools.cache
def small_model() -> Transformer:
    """Two blocks of width 24 with random weights."""
    with jax.ensure_compile_time_eval():  # a test may ask for it first within a program
        return Transformer(SMALL, nnx.Rngs(0))


class Inputs(NamedTuple):
    """Noise and text for `denoise`: two guidance branches of `videos` videos."""

    latents: jax.Array
    context: jax.Array


def small_inputs(seed: int = 0, *, videos: int = 1, grid=(3, 4, 5)) -> Inputs:
    """Latents whose tokens (3 x 4 x 5 = 60) tenths divide, and a text of 5 rows."""
    frames, height, width = grid
    keys = jax.random.split(jax.random.key(seed))
    latents = jax.random.normal(keys[0], (videos, frames, 2 * height, 2 * width, 4))
    return Inputs(latents, jax.random.normal(keys[1], (2 * videos, 5, 8)))


def random_levels(rng: np.random.Generator, steps: int) -> tuple[int, ...]:
    """A schedule's levels: dense first, then any of a few, so that few programs are compiled."""
    return (10, *(int(level) for level in rng.choice([0, 3, 8, 10], steps - 1)))
