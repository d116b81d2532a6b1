"""Flow-matching solvers as tables: every linear multistep rule is one `step`.

A sample is `x = (1 - sigma) clean + sigma noise` and the model predicts the velocity
`noise - clean`. A solver is a table of coefficients computed in float64 on the host, so the
jitted loop holds no logarithm of zero and a change of solver, steps or shift of equal length
needs no new program.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from astraea_jax import checks
from astraea_jax.checks import Refusal
from astraea_jax.schedule import check_steps

_TRAIN_STEPS = 1000

SHIFTS = 0.001, 1000.0
"""Least and largest flow shift: beyond them, noise levels run together at one end."""


class Solver(NamedTuple):
    """Coefficients of a run of T steps; a pytree whose leaves have a leading axis T.

    With `x` the sample at a step, `m = x - sigma v` the clean sample that the model predicts,
    `m1`, `m2` the two before it and `x1` the corrected sample of the step before:
    `c = correct . (x, x1, m2, m1, m)` and the next sample is `predict . (c, m, m1)`.

    Attributes:
      sigma: noise level of each step, in (0, 1].
      timestep: what the model is told, in 0..1000.
      correct: corrector weights.
      predict: predictor weights.
    """

    sigma: Float[Array, "T"] | np.ndarray
    timestep: Float[Array, "T"] | np.ndarray
    correct: Float[Array, "T 5"] | np.ndarray
    predict: Float[Array, "T 3"] | np.ndarray

    @property
    def steps(self) -> int:
        """Number of steps, T."""
        return len(self.sigma)


def check(solver: Any) -> Solver:
    """Returns `solver` if it is a table of coefficients.

    Raises:
      Refusal: it is something else, a solver's name say.
    """
    shaped = isinstance(solver, Solver) and all(hasattr(part, "shape") for part in solver)
    if not shaped or tuple(map(np.ndim, solver)) != (1, 1, 2, 2):
        raise Refusal(
            f"solver must be a table, as solvers.make gives it by name; got {checks.shown(solver)}"
        )
    return solver


class SolverState(NamedTuple):
    """History of a multistep solver, each of the shape of the latents, float32.

    Attributes:
      corrected: the corrected sample of the step before.
      clean_1: the clean sample predicted at the step before.
      clean_2: the one predicted two steps before.
    """

    corrected: Array
    clean_1: Array
    clean_2: Array


def init(latents: Float[Array, "*shape"]) -> SolverState:
    """An empty history for samples of this shape."""
    zeros = jnp.zeros(latents.shape, jnp.float32)
    return SolverState(zeros, zeros, zeros)


def step(
    solver: Solver,
    state: SolverState,
    latents: Float[Array, "*shape"],
    velocity: Float[Array, "*shape"],
) -> tuple[Float[Array, "*shape"], SolverState]:
    """One step of the solver's table.

    Args:
      solver: the rows of one step (no leading axis).
      state: history; of `init` at the first step.
      latents: the sample at this step's sigma, float32.
      velocity: the model's prediction there, guidance applied, float32.

    Returns:
      The sample at the next step's sigma, and the history for it.
    """
    clean = latents - solver.sigma * velocity
    terms = (latents, state.corrected, state.clean_2, state.clean_1, clean)
    corrected = _combine(solver.correct, terms)
    following = _combine(solver.predict, (corrected, clean, state.clean_1))
    return following, SolverState(corrected, clean, state.clean_1)


class Gap(NamedTuple):
    """What is known of the steps since a velocity was last computed.

    While a velocity is reused the truth is thought to lie on a straight line in sigma from the
    last computed velocity to the next one, whose slope is not yet known. A solver is linear, so
    what that slope does to the sample and to its history is one weight for each.

    All are of the latents' shape behind an axis of R: the parts of the velocity that are computed
    and reused apart from one another. There is one, the guided velocity, where the guidance
    branches compute the same tokens, and else one for each branch.

    Attributes:
      sigma: where the velocity was last computed; 2, above any noise level, before the first.
      velocity: what it was.
      latents: weight of the slope in the sample.
      history: weight of the slope in the solver's history.
    """

    sigma: Array
    velocity: Array
    latents: Array
    history: SolverState


def no_gap(latents: Float[Array, "*shape"], parts: int = 1) -> Gap:
    """Before the first step."""
    zeros = jnp.zeros((parts, *latents.shape), jnp.float32)
    return Gap(zeros + 2, zeros, zeros, init(zeros))


def close_gap(
    gap: Gap,
    state: SolverState,
    latents: Float[Array, "*shape"],
    velocity: Float[Array, "R *shape"],
    fresh: Bool[Array, "R *shape"],
    sigma: Float[Array, ""],
    *,
    shares: Sequence[float | Float[Array, ""]] = (1.0,),
) -> tuple[Float[Array, "*shape"], SolverState, Gap]:
    """Corrects the sample and the history where a velocity has been computed anew.

    The result is what the solver would have reached, had the steps since the last computed
    velocity used the line between the two instead of the older one, in each part.

    Args:
      gap: since the last computed velocity.
      state: the solver's history.
      latents: the sample at this step.
      velocity: parts of the velocity at this step, each reused where it is not fresh.
      fresh: where it has been computed at this step.
      sigma: this step's noise level.
      shares: what each part counts in the velocity that the solver is given.
    """
    slope = (velocity - gap.velocity) / (gap.sigma - sigma)

    def corrected(value, weight):
        for part, share in enumerate(shares):
            add = share * (weight[part] * slope[part])
            value = jnp.where(fresh[part] & (weight[part] != 0), value + add, value)
        return value

    latents = corrected(latents, gap.latents)
    state = SolverState(*map(corrected, state, gap.history))
    zeros = jnp.zeros_like(gap.latents)
    closed = Gap(jnp.full_like(gap.sigma, sigma), velocity, zeros, init(zeros))
    return latents, state, jax.tree.map(lambda new, old: jnp.where(fresh, new, old), closed, gap)


def widen_gap(solver: Solver, gap: Gap) -> Gap:
    """The gap after a step of the solver's table: the weights take the step as a sample would."""
    latents, history = step(solver, gap.history, gap.latents, gap.sigma - solver.sigma)
    return gap._replace(latents=latents, history=history)


Grid = Literal["diffusers", "original"]
"""Whose noise levels a solver steps through; the two differ by up to 1e-2 in a sample."""


def euler(steps: int, *, shift: float = 3.0, grid: Grid = "diffusers") -> Solver:
    """Euler on the grid of Diffusers' FlowMatchEulerDiscreteScheduler, or the original's.

    Args:
      steps: number of steps, 1..10_000.
      shift: flow shift, in 0.001..1000; larger spends more steps on high noise.
      grid: Diffusers' (shifted twice at the low end, times with fractions) or that of the
        original's UniPC.

    Source: Diffusers scheduling_flow_match_euler_discrete.
    """
    steps, shift = _checked(steps, shift, grid)
    if grid == "original":
        sigmas = _unipc_sigmas(steps, shift, grid)
        timesteps = np.trunc(_TRAIN_STEPS * sigmas[:-1])
    else:
        last = _shifted(1 / _TRAIN_STEPS, shift)
        sigmas = np.append(_shifted(np.linspace(1.0, last, steps), shift), 0.0)
        timesteps = _TRAIN_STEPS * sigmas[:-1]
    correct, predict = np.zeros((steps, 5)), np.zeros((steps, 3))
    correct[:, 0] = 1
    predict[:, 0] = sigmas[1:] / sigmas[:-1]
    predict[:, 1] = 1 - predict[:, 0]
    return _table(sigmas, timesteps, correct, predict)


def unipc(steps: int, *, shift: float = 3.0, grid: Grid = "diffusers") -> Solver:
    """UniPC of order 2 (bh2, predicting the clean sample).

    Args:
      steps: number of steps, 1..10_000.
      shift: flow shift, in 0.001..1000.
      grid: Diffusers' UniPC with use_flow_sigmas, or the original's FlowUniPC.

    Source: Diffusers scheduling_unipc_multistep; Wan 2.1 utils/fm_solvers_unipc; UniPC, arXiv
    2302.04867.
    """
    steps, shift = _checked(steps, shift, grid)
    sigmas = _unipc_sigmas(steps, shift, grid)
    half_log_snr = _half_log_snr(sigmas)
    correct, predict = np.zeros((steps, 5)), np.zeros((steps, 3))
    correct[0, 0] = 1
    order = 1
    for i in range(steps):
        if i:
            correct[i] = _unipc_correct(sigmas, half_log_snr, i, order)
        order = min(2, i + 1, steps - i)
        predict[i] = _unipc_predict(sigmas, half_log_snr, i, order)
    return _table(sigmas, np.trunc(_TRAIN_STEPS * sigmas[:-1]), correct, predict)


def dpmpp(steps: int, *, shift: float = 3.0, grid: Grid = "original") -> Solver:
    """DPM-Solver++ of order 2 (midpoint, predicting the clean sample), first order at both ends.

    Args:
      steps: number of steps, 1..10_000.
      shift: flow shift, in 0.001..1000.
      grid: the original's FlowDPM++, which starts at pure noise, or that of Diffusers' UniPC.

    Source: Wan 2.1 utils/fm_solvers; DPM-Solver++, arXiv 2211.01095.
    """
    steps, shift = _checked(steps, shift, grid)
    if grid == "original":
        sigmas = np.append(_shifted(np.linspace(1.0, 0.0, steps + 1)[:steps], shift), 0.0)
    else:
        sigmas = _unipc_sigmas(steps, shift, grid)
    lam = _half_log_snr(sigmas)
    correct, predict = np.zeros((steps, 5)), np.zeros((steps, 3))
    correct[:, 0] = 1
    for i in range(steps):
        h = lam[i + 1] - lam[i]
        scale = -(1 - sigmas[i + 1]) * math.expm1(-h)
        predict[i] = sigmas[i + 1] / sigmas[i], scale, 0.0
        if 0 < i < steps - 1:
            past = 0.5 * scale * h / (lam[i] - lam[i - 1])  # 0 after pure noise: infinitely far
            predict[i] += 0.0, past, -past
    return _table(sigmas, np.trunc(_TRAIN_STEPS * sigmas[:-1]), correct, predict)


SOLVERS = {"unipc": unipc, "dpm++": dpmpp, "euler": euler}


def make(name: str, steps: int, *, shift: float = 3.0, grid: Grid = "diffusers") -> Solver:
    """The solver called `name`.

    Raises:
      Refusal: an unknown name or grid, or a number of steps or a shift out of range.
    """
    if not isinstance(name, str) or name not in SOLVERS:
        raise Refusal(f"solver must be one of {', '.join(SOLVERS)}; got {checks.shown(name)}")
    return SOLVERS[name](steps, shift=shift, grid=grid)


def _unipc_sigmas(steps: int, shift: float, grid: Grid) -> np.ndarray:
    """Noise levels of UniPC, the last one 0."""
    if grid == "original":
        return np.append(_shifted(np.linspace(0.999, 0.0, steps + 1)[:steps], shift), 0.0)
    sigmas = _shifted(np.linspace(1.0, 1 / _TRAIN_STEPS, steps + 1)[:steps], shift)
    sigmas[0] -= 1e-6 if abs(sigmas[0] - 1) < 1e-6 else 0.0
    return np.append(sigmas, 0.0)


def _half_log_snr(sigmas: np.ndarray) -> np.ndarray:
    """Half of the logarithm of the signal-to-noise ratio: infinite at both ends."""
    with np.errstate(divide="ignore"):
        return np.log1p(-sigmas) - np.log(sigmas)


def _unipc_correct(sigmas, lam, i: int, order: int) -> np.ndarray:
    """Weights of (x, x1, m2, m1, m) that correct the sample that reached step i."""
    h = lam[i] - lam[i - 1]
    grow = math.expm1(-h)
    scale = (1 - sigmas[i]) * grow
    row = np.array([0, sigmas[i] / sigmas[i - 1], 0, -scale, 0])
    if order == 1:
        weight_past, weight_now, ratio = 0.0, 0.5, 1.0
    else:
        ratio = (lam[i - 2] - lam[i - 1]) / h
        first = grow / -h - 1
        second = first / -h - 0.5
        weight_past, weight_now = np.linalg.solve(
            [[1, 1], [ratio, 1]], [first / grow, 2 * second / grow]
        )
    # D = (m2 - m1) / ratio and d = m - m1.
    row += -scale * np.array(
        [0, 0, weight_past / ratio, -weight_past / ratio - weight_now, weight_now]
    )
    return row


def _unipc_predict(sigmas, lam, i: int, order: int) -> np.ndarray:
    """Weights of (c, m, m1) that lead from step i to the next sigma."""
    if sigmas[i + 1] == 0:
        # lam is infinite here; the limit is the clean sample itself.
        return np.array([0.0, 1.0, 0.0])
    h = lam[i + 1] - lam[i]
    scale = (1 - sigmas[i + 1]) * math.expm1(-h)
    row = np.array([sigmas[i + 1] / sigmas[i], -scale, 0.0])
    if order == 2:
        ratio = (lam[i - 1] - lam[i]) / h
        row += -scale * 0.5 / ratio * np.array([0.0, -1.0, 1.0])
    return row


def _combine(weights: Float[Array, "M"] | np.ndarray, terms: tuple[Array, ...]) -> Array:
    """Weighted sum; a weight of zero drops its term even where that is not finite."""
    total = jnp.zeros(terms[0].shape, jnp.float32)
    for index, term in enumerate(terms):
        weight = weights[index]
        total = total + jnp.where(weight == 0, 0.0, weight * term.astype(jnp.float32))
    return total


def _shifted(sigma, shift: float):
    """Moves noise levels towards 1 by the flow shift."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def _checked(steps: int, shift: float, grid: str) -> tuple[int, float]:
    """Steps and shift as plain numbers."""
    checks.one_of("grid", grid, get_args(Grid))
    return check_steps(steps), checks.number("shift", shift, *SHIFTS)


def _table(sigmas, timesteps, correct, predict) -> Solver:
    """The float32 arrays that the loop reads."""
    as_float = (np.asarray(a, np.float32) for a in (sigmas[:-1], timesteps, correct, predict))
    return Solver(*as_float)
