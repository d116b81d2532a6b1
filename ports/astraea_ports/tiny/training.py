"""What trains the small model's parts, and the reader of its videos: as `astraea train-tiny` asks.

The same trainees would train any Wan; here are the numbers that suit this one, and its clips.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from astraea_jax import checks
from astraea_ports import checkpoints, tiny
from astraea_ports.tiny import scenes
from astraea_ports.tiny.lessons import Lessons
from astraea_ports.tiny.reader_training import ReaderRecipe, ReaderTraining
from astraea_ports.training.pool import MOST_POOLED
from astraea_ports.training.recipe import MOST_CLIPS, Recipe
from astraea_ports.training.run import Trainee
from astraea_ports.wan.training.forward import Layout
from astraea_ports.wan.training.transformer import PoolPlan, Sheet, TransformerTraining
from astraea_ports.wan.training.vae import VAETraining
from astraea_ports.wan.training.vae_step import Drawn, VAERecipe
from astraea_ports.wan.vae_weights import load_vae

Part = Literal["transformer", "vae", "reader"]

TWO = 0.5
"""Share of the VAE's clips with two objects."""

MOST_ON_CPU = 4096
"""Clips of a batch or a pool without a GPU: an hour to draw and encode, or a step to take."""

CPU_LAYOUTS = (Layout(), Layout(recompute=False))
GPU_LAYOUTS = (
    Layout("cudnn", "xla", recompute=False, unroll=True),
    Layout("cudnn", "triton", recompute=True, unroll=True),
    Layout("cudnn", "triton", recompute=False, unroll=True),
)
"""Of a step, those that may be the fastest. They differ by rounding alone, as their losses after
equal steps show. Left out on a GPU: XLA's attention, which writes every score, and a loop over the
blocks, which copies what every block keeps for the backward pass."""


@dataclasses.dataclass(frozen=True)
class Order:
    """What to train and how; None is what suits the device. See `astraea train-tiny --help`."""

    part: Part
    model: str
    revision: str | None
    batch: int | None
    rate: float
    two: float
    spin: float
    text_rate: float
    wrong_text: float
    even_times: float
    span: tuple[float, float]
    pool: int | None
    refresh_every: int
    seed: int
    sheet: int

    def __post_init__(self):
        """Refuses what is out of range, but for what the recipes refuse."""
        checks.one_of("part", self.part, get_args(Part))
        checks.whole("sheet", self.sheet, 0, len(tiny.captions()))
        checks.number("rate", self.rate, 0, 100, above=True)
        where = "" if _large() else "without a GPU"
        for name, most in (("batch", MOST_CLIPS), ("pool", MOST_POOLED)):
            if getattr(self, name) is not None:
                most = most if _large() else MOST_ON_CPU
                checks.whole(name, getattr(self, name), 1, most, unit=where)

    def maker(self, steps: int) -> Callable[[], Trainee]:
        """What makes the trainee of a run of so many steps; it alone loads the model.

        Raises:
          Refusal: an option out of range.
        """
        make = {"transformer": self._transformer, "vae": self._vae, "reader": self._reader}
        return make[self.part](steps)

    @property
    def _start(self) -> dict[str, Any]:
        """Where the weights come from: a model, or its sizes alone."""
        nothing = self.model == "nothing"
        model = "tiny" if nothing else self.model
        return {"model": model, "revision": self.revision, "from_nothing": nothing}

    def _transformer(self, steps: int) -> Callable[[], Trainee]:
        source = Lessons(seed=self.seed, two=self.two, spin=self.spin)
        devices = jax.device_count()
        recipe = Recipe(
            steps=steps,
            batch=_or(self.batch, 128 * devices if _large() else 4),
            muon_rate=6e-3 * self.rate,
            adam_rate=1.5e-3 * self.rate,
            text_rate=self.text_rate,
            wrong_text=self.wrong_text,
            time_even=self.even_times,
            span=self.span,
            seed=self.seed,
            dtype=_dtype(),
        )
        plan = PoolPlan(
            size=_or(self.pool, 32768 if _large() else 64),
            block=32 * devices if _large() else 4,
            refresh_every=self.refresh_every,
        )
        return functools.partial(
            TransformerTraining,
            source=source,
            recipe=recipe,
            plan=plan,
            sheet=Sheet(tiny.captions()[: self.sheet]),
            data=source.settings,
            **self._start,
        )

    def _vae(self, steps: int) -> Callable[[], Trainee]:
        recipe = VAERecipe(
            steps=steps,
            clips=_or(self.batch, 16 if _large() else 2),
            muon_rate=0.015 * self.rate,
            adam_rate=2e-3 * self.rate,
            seed=self.seed,
            dtype=_dtype(),
        )
        return functools.partial(
            VAETraining, draw=draw_clips, recipe=recipe, data={"two": TWO}, **self._start
        )

    def _reader(self, steps: int) -> Callable[[], Trainee]:
        recipe = ReaderRecipe(
            steps=steps,
            batch=_or(self.batch, 128 if _large() else 16),
            muon_rate=0.02 * self.rate,
            adam_rate=2e-3 * self.rate,
            # On a CPU the VAE would take nearly all of the time.
            vae_every=6 if _large() else 0,
            seed=self.seed,
        )

        def make() -> Trainee:
            folder = checkpoints.model_folder(self.model, revision=self.revision)
            return ReaderTraining(load_vae(folder / "vae", dtype=jnp.dtype(_dtype())), recipe)

        return make


def _or(given: int | None, otherwise: int) -> int:
    return otherwise if given is None else given


def _large() -> bool:
    """Whether there is more than a CPU."""
    return jax.default_backend() != "cpu"


def _dtype() -> Literal["bfloat16", "float32"]:
    """Of the products."""
    return "bfloat16" if _large() else "float32"


def draw_clips(key: jax.Array, count: int) -> Drawn:
    """Clips for the VAE."""
    clips = scenes.make_clips(jax.random.split(key, count), two=TWO)
    return Drawn(clips.video, clips.cover)


def to_time(
    model: str,
    *,
    batch: int,
    block: int,
    dtype: Literal["bfloat16", "float32"],
    revision: str | None,
) -> TransformerTraining:
    """A training whose steps are to be timed: nothing in its pool is replaced by itself.

    Args:
      model: "tiny", or a folder or hub id of a model for the same clips.
      batch: clips a step.
      block: clips that are encoded at once; the pool has eight such blocks, on a CPU one.
      dtype: of the products.
      revision: of a hub id: a branch, a tag or a commit.

    Raises:
      Refusal: no such model, or a batch that the devices can't share.
    """
    size = 8 * block if jax.default_backend() == "gpu" else block
    return TransformerTraining(
        model,
        Lessons(),
        Recipe(steps=10**6, batch=batch, dtype=dtype),
        plan=PoolPlan(size=size, block=block, refresh_every=0),
        revision=revision,
    )
