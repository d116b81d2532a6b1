"""Schedules scored against the dense videos of some prompts: the fitness of a search."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from astraea_jax import checks, solvers
from astraea_jax import denoise as loop
from astraea_jax.checks import Refusal
from astraea_jax.methods import Method
from astraea_jax.model import Conditions, VideoDiT
from astraea_jax.population.lanes import (
    AXIS,
    Plan,
    can_run_in_lanes,
    denoise_many,
    denoise_start,
)
from astraea_jax.schedule import LEVELS
from astraea_jax.solvers import Solver

MOST = 10_000
"""Lanes and schedules of a batch: far more than any device holds."""

Rows = Int[np.ndarray, "S T"] | Sequence[Sequence[int]]
"""Schedules, one a row."""


class Scorer:
    """Scores schedules against the dense videos of some prompts; an argument for a search.

    The dense videos and the dense start that all schedules share are computed once.
    """

    def __init__(
        self,
        model: VideoDiT,
        latents: Float[Array, "P F Y X C"],
        conditions: Conditions,
        *,
        solver: Solver,
        method: Method,
        guidance: float | None = None,
        key: Key[Array, ""] | None = None,
        dense_start: int = 1,
        plan: Plan | None = None,
        lanes: int = 8,
        batch: int | None = None,
        decode: Callable[[Array], Array] | None = None,
        precision: str | None = None,
        devices: Sequence[Any] | None = None,
    ):
        """Computes the dense start that all schedules share.

        Args:
          model: a video diffusion transformer.
          latents: Gaussian noise, one prompt a row.
          conditions: what the model takes beside noise, conditional rows first.
          solver: T steps.
          method: how the schedules' steps are computed.
          guidance: scale, or None for none.
          key: for methods that draw; None is key 0.
          dense_start: leading steps that every schedule has at level 10, at least 1.
          plan: see `denoise_many`; None is "lanes" where the method has such a plan, else "map".
          lanes: schedules denoised at a time on each device.
          batch: schedules handed to a device in one program; fewer are filled up with schedules
            that compute nothing. None is four times the lanes.
          decode: latents [P, ...] to pixels; the error is then that of pixels.
          precision: of matrix products, as `jax.default_matmul_precision`.
          devices: schedules are spread over them; None is the first one.

        Raises:
          Refusal: shapes that do not fit, a plan that the method does not have, or a number out of
            range.
        """
        solver = solvers.check(solver)
        settings = loop.check(model, latents, conditions, method, guidance, key, False)
        in_lanes = can_run_in_lanes(method)
        plan = ("lanes" if in_lanes else "map") if plan is None else plan
        checks.one_of("plan", plan, get_args(Plan))
        if plan == "lanes" and not in_lanes:
            raise Refusal(f'{method.name} has no plan "lanes"; use "map"')
        checks.whole("dense_start", dense_start, 1, solver.steps)
        for name, value in (("lanes", lanes), ("batch", batch)):
            if value is not None or name == "lanes":
                checks.whole(name, value, 1, MOST)
        self._method, self._dense_start = method, dense_start
        self.steps, self.num_prompts = solver.steps, latents.shape[0]
        self._devices = list(devices or jax.devices()[:1])
        self._batch = (batch or 4 * lanes) * len(self._devices)
        self._decode = decode
        mesh = Mesh(np.array(self._devices), (AXIS,)) if len(self._devices) > 1 else None
        scale = jnp.float32(1.0 if guidance is None else guidance)
        key = jax.random.key(0) if key is None else key
        latents = jnp.asarray(latents, jnp.float32)
        self._shape = latents.shape
        prepared, state = denoise_start(
            model, latents, conditions, solver, scale, key,
            settings=settings, dense_start=dense_start, precision=precision,
        )  # fmt: skip
        self._many = functools.partial(
            denoise_many, model, prepared, state, solver, guidance=scale, key=key,
            settings=settings, dense_start=dense_start, plan=plan, lanes=lanes,
            precision=precision, mesh=mesh,
        )  # fmt: skip
        self._dense: Array | None = None
        self._target: Array | None = None

    @property
    def dense(self) -> Float[Array, "P F Y X C"]:
        """Latents of the dense videos, by the program that scores: rounding is not an error."""
        if self._dense is None:
            self._dense = self.latents(self._full)[0]
        return self._dense

    @property
    def _full(self) -> np.ndarray:
        return np.full((1, self.steps), LEVELS, np.int8)

    def latents(self, levels: Rows) -> Float[Array, "S P F Y X C"]:
        """Denoised latents of each schedule.

        Raises:
          Refusal: levels that are none or that the method can't do, another number of them than
            steps, or a start that is not as dense as the one that all share.
        """
        batches = [latents[places] for latents, places in self._batches(self._checked(levels))]
        return jnp.concatenate(batches or [jnp.zeros((0, *self._shape), jnp.float32)])

    def __call__(self, levels: Rows) -> Float[np.ndarray, "S P"]:
        """Mean squared error of each schedule and prompt: of latents, or of what `decode` gives.

        Raises:
          Refusal: as `latents`.
        """
        levels = self._checked(levels)
        number = len(levels)
        if not number:
            return np.zeros((0, self.num_prompts))
        if self._dense is None:
            # Along with the schedules, so that its lane is not the only one at work.
            levels = np.concatenate([self._full, levels])
        rows, dense = [], self._dense
        for latents, places in self._batches(levels):
            if dense is None:
                self._dense = dense = latents[int(places[0])]
            rows.append(self._compared(latents, places, dense))
        return np.concatenate(rows)[-number:]

    def _compared(self, latents, places, dense) -> np.ndarray:
        """Errors of some rows of a batch. Whole batches are compared: one shape, one program."""
        if self._decode is None:
            return np.asarray(_errors(latents, dense), np.float64)[places]
        if self._target is None:
            self._target = self._decode(dense)
        videos = (self._decode(latents[int(place)])[None] for place in places)
        return np.array([np.asarray(_errors(v, self._target)[0], np.float64) for v in videos])

    def compiled(self) -> jax.stages.Compiled:
        """The program of one batch, compiled now if need be: what to ask for its memory."""
        levels = jnp.zeros((self._batch, self.steps), jnp.int8)
        with _partitioner(len(self._devices)):
            return denoise_many.executable(*self._many.args, levels, **self._many.keywords)

    def _batches(self, levels) -> Iterator[tuple[Array, np.ndarray]]:
        """Latents of a whole batch, and where in it the next rows of `levels` are."""
        for first in range(0, len(levels), self._batch):
            yield self._run(levels[first : first + self._batch])

    def _checked(self, levels: Rows) -> np.ndarray:
        """The schedules as an array, int8 [S, T]."""
        if hasattr(levels, "__array__"):
            levels = np.asarray(levels)
        if not (isinstance(levels, list | tuple) or np.ndim(levels)):
            raise Refusal(f"expected levels [S, {self.steps}]; got {checks.shown(levels)}")
        rows = []
        for number, row in enumerate(levels, 1):
            try:
                known = loop.known_levels(
                    row, self.steps, self._method, dense_start=self._dense_start
                )
            except Refusal as refusal:
                raise Refusal(f"schedule {number}: {refusal}") from None
            rows.append(known)
        return np.array(rows, np.int8).reshape(len(rows), self.steps)

    def _run(self, levels: np.ndarray) -> tuple[Array, np.ndarray]:
        """One program: rows dealt out so that every device has as much to do."""
        number, devices = len(levels), len(self._devices)
        filled = np.zeros((self._batch, self.steps), np.int8)
        filled[:number] = levels
        by_cost = np.argsort(-filled.astype(int).sum(axis=1), kind="stable")
        dealt = by_cost.reshape(-1, devices).T.reshape(-1)
        with _partitioner(devices):
            return self._many(jnp.asarray(filled[dealt])), np.argsort(dealt)[:number]


@contextlib.contextmanager
def _partitioner(devices: int) -> Iterator[None]:
    """On JAX 0.11 several devices get the older partitioner.

    The newer one, Shardy, ends there in a segmentation fault where it drops unused arguments.
    """
    if devices == 1 or jax.__version_info__ >= (0, 12):
        yield
        return
    newer = jax.config.jax_use_shardy_partitioner
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        yield
    finally:
        jax.config.update("jax_use_shardy_partitioner", newer)


@jax.jit
def _errors(latents: Float[Array, "S P *rest"], target: Float[Array, "P *rest"]):
    return jnp.square(latents - target).mean(axis=range(2, latents.ndim))
