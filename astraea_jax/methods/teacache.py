"""TeaCache: a step is skipped while the time embedding has moved little since the last."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from astraea_jax import checks
from astraea_jax.checks import Refusal
from astraea_jax.methods import base, blocks
from astraea_jax.model import Geometry
from astraea_jax.solvers import Solver

Signal = Literal["embedding", "projected"]


class TeaCacheState(NamedTuple):
    """What a skipped step reuses, and what decides whether one is.

    Attributes:
      residual: what all blocks together added to the tokens when they last ran.
      signal: of the step before.
      moved: estimated change since the blocks last ran.
    """

    residual: Float[Array, "B N H"]
    signal: Float[Array, " D"]
    moved: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class TeaCache(base.OwnPlan):
    """Adds up the estimated change of the model's answer; runs the model once it passes a limit.

    A skipped step embeds the latents, adds what the blocks added when they last ran, and runs the
    head with the current time.

    Attributes:
      threshold: change up to which steps are skipped, above 0: .08 to .26 for Wan.
      coefficients: of the polynomial, highest power first, that takes the relative change of the
        signal to that of the answer. The defaults are Wan 1.3B's.
      signal: of `VideoDiT.signals`, what is compared from step to step.
      first: steps at the start that always run, at least 1.
      last: steps at the end that always run.

    Source: TeaCache 3; TeaCache4Wan2.1's `teacache_generate.py` with `--use_ret_steps`.
    """

    threshold: float = 0.08
    coefficients: tuple[float, ...] = (
        *(-5.21862437e04, 9.23041404e03, -5.28275948e02, 1.36987616e01, -4.99875664e-02),
    )
    signal: Signal = "projected"
    first: int = 5
    last: int = 0

    def __post_init__(self):
        checks.number("threshold", self.threshold, 0, 1e6, above=True)
        checks.whole("first", self.first, 1, 10_000)
        checks.whole("last", self.last, 0, 10_000)
        numbers = checks.ListOf(checks.Number(-1e12, 1e12), 1, 32)
        checks.hold("coefficients", self.coefficients, numbers)
        object.__setattr__(self, "coefficients", tuple(self.coefficients))
        checks.one_of("signal", self.signal, get_args(Signal))

    @property
    def name(self) -> str:
        """What tables call it: with its threshold, as "teacache-0.08"."""
        return f"teacache-{self.threshold:g}"

    @property
    def modes(self) -> tuple[base.Mode, ...]:
        """Skip or run."""
        return (base.SKIP, base.DENSE)

    def check(self, geometry: Geometry) -> None:
        """Refuses a model without the signal."""
        if self.signal not in dict(geometry.signals):
            raise Refusal(
                f"{self.name} compares the signal {self.signal!r}, which this model has not; it "
                f"has {', '.join(dict(geometry.signals)) or 'none'}: choose another"
            )

    def plan(self, levels: Sequence[int], solver: Solver) -> None:
        """None: decided as it runs."""
        del levels, solver

    def decide(
        self, evaluation: base.Evaluation, inputs: base.StepInputs, state: TeaCacheState
    ) -> tuple[Int[Array, ""], TeaCacheState]:
        """Runs where the estimated change since the last run passes the threshold."""
        now = self._signal(evaluation, inputs)
        change = jnp.abs(now - state.signal).mean() / jnp.abs(state.signal).mean()
        coefficients = jnp.asarray(self.coefficients, jnp.float32)
        moved = state.moved + jnp.polyval(coefficients, change)
        kept: Bool[Array, ""] = (inputs.index < self.first) | (
            inputs.index >= evaluation.steps - self.last
        )
        run = kept | ~(moved < self.threshold)
        moved = jnp.where(run, 0.0, moved)
        return run.astype(jnp.int32), state._replace(signal=now, moved=moved)

    def _signal(self, evaluation: base.Evaluation, inputs: base.StepInputs) -> Float[Array, " D"]:
        """What is compared; of one row, since time alone decides it, and all rows have one."""
        signals = evaluation.model.signals(
            evaluation.model.modulation(inputs.timestep, evaluation.prepared)
        )
        return signals[self.signal][0].astype(jnp.float32)

    def init(self, geometry: Geometry, batch: int, dtype: jnp.dtype) -> TeaCacheState:
        """Zeros."""
        return TeaCacheState(
            jnp.zeros((batch, geometry.num_tokens, geometry.width), dtype),
            jnp.zeros((dict(geometry.signals)[self.signal],), jnp.float32),
            jnp.zeros((), jnp.float32),
        )

    def forward(
        self,
        mode: base.Mode,
        evaluation: base.Evaluation,
        inputs: base.StepInputs,
        state: TeaCacheState,
    ) -> base.Forward:
        """The model, or as if its blocks added what they last did."""
        computed = mode != base.SKIP
        run = blocks.run_residual if computed else blocks.reuse_residual
        velocity, residual = run(evaluation, inputs, state.residual)
        trace = (blocks.full_trace if computed else blocks.empty_trace)(
            evaluation.geometry, len(inputs.latents)
        )
        return base.Forward(velocity, state._replace(residual=residual), trace)
