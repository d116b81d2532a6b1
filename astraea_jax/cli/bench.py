"""`astraea bench`: what times this machine, and says how exact it is."""

import dataclasses
import math
import pathlib
from typing import Literal

from astraea_jax.bench.shapes import SHARES
from astraea_jax.cli.options import (
    DEFAULT_SIZE,
    RESIDENT,
    Chosen,
    ChosenSize,
    Implementation,
)

Driver = Literal["dynamic", "static"]

FAST = dataclasses.replace(RESIDENT, precision="fast")
"""What is timed unless told."""


def attention(
    *,
    shapes: tuple[str, ...] = (),
    shares: tuple[float, ...] = SHARES,
    implementations: tuple[Implementation, ...] = (),
    rounds: int = 5,
    tune: bool = False,
    output: pathlib.Path | None = None,
) -> None:
    """Checks and times query-only attention on the shapes of real models.

    Args:
      shapes: Names in astraea_jax/bench/shapes.py; all when left out, without a GPU the smallest.
      shares: Shares of the tokens that are queries, above 0 and at most 1.
      implementations: Those to run; all that run here when left out.
      rounds: How often each is timed.
      tune: Time every tiling of the kernels first, and remember the fastest for this machine.
      output: A .json file for every number.
    """
    from astraea_jax.bench import attention

    attention.run(shapes, shares, implementations, rounds=rounds, tune=tune, output=output)


def denoise(
    *,
    model: Chosen = FAST,
    method: str = "astraea",
    levels: tuple[int, ...] = (10, 7, 5, 4, 3, 1),
    drivers: tuple[Driver, ...] = ("static", "dynamic"),
    steps: int = 10,
    rounds: int = 15,
    seconds: float = math.inf,
    size: ChosenSize = DEFAULT_SIZE,
    stages: bool = True,
    profile: bool = False,
    output: pathlib.Path | None = None,
) -> None:
    """Times a step, dense and at each level, with both drivers, in one run.

    Args:
      model: Which model.
      method: A method that computes some of the tokens.
      levels: Tenths of the tokens, 1..10.
      drivers: "static", "dynamic" or both.
      steps: Of a run of the dynamic driver, the first of them dense; its start (text, empty cache)
        is charged to the others.
      rounds: How often each is timed.
      seconds: No round starts after so many, counted from the first warm run; one always runs.
      size: Of the video.
      stages: Also time text and decoding.
      profile: Also say, on a GPU, where the time of each program goes.
      output: A .json file for every number.
    """
    from astraea_jax.bench import denoise

    denoise.run(
        model,
        method,
        levels,
        drivers,
        steps=steps,
        rounds=rounds,
        seconds=seconds,
        size=size.check(),
        stages=stages,
        profile=profile,
        output=output,
    )


def exactness(
    *,
    model: str = "tiny",
    revision: str | None = None,
    methods: tuple[str, ...] = ("astraea", "astraea-published", "step-level"),
    frames: int | None = None,
    output: pathlib.Path | None = None,
) -> None:
    """Measures how exact this device is: budget 1, selected rows, drivers, batches.

    Args:
      model: "tiny", a folder, or a hub id.
      revision: Of a hub id: a branch, a tag or a commit.
      methods: Those that are held against the dense model.
      frames: Frames of the videos, 4k + 1; the model's default when left out.
      output: A .json file for every number.
    """
    from astraea_jax.bench import exactness

    exactness.run(model, revision, methods, frames, output)


def training(
    *,
    model: str = "tiny",
    revision: str | None = None,
    batch: int | None = None,
    steps: int = 20,
    output: pathlib.Path | None = None,
) -> None:
    """Times a training step in the layouts that may win, the encoding of clips, and profiles it.

    Args:
      model: "tiny", or a folder or hub id of a model for the same clips.
      revision: Of a hub id: a branch, a tag or a commit.
      batch: Clips a step; 128 for each GPU, or 2 without one.
      steps: Timed steps of each layout.
      output: A .json file for every number.
    """
    from astraea_jax.bench import training

    training.run(model, revision, batch, steps, output)
