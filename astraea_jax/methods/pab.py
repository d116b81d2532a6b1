"""PAB, pyramid attention broadcast: attention is computed every few steps, and reused between."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from astraea_jax import cache as token_cache
from astraea_jax import checks
from astraea_jax import model as core
from astraea_jax.checks import Refusal
from astraea_jax.methods import base, blocks
from astraea_jax.methods.blocks import Place, is_reused
from astraea_jax.model import Geometry, Rows
from astraea_jax.solvers import Solver

MOST = 1000
"""Steps of a period, far more than a part can be reused for."""


class PabState(NamedTuple):
    """What each part that has a period gave when it was last computed, un-gated.

    Attributes:
      outs: by part; a row for each block, in order, whether the block has the part or not.
    """

    outs: dict[str, Float[Array, "L B N H"]]


@dataclasses.dataclass(frozen=True)
class PAB(base.OwnPlan):
    """Each kind of attention has a period; between its steps, what it gave is added again.

    At step s of T, counted from 0, a part is reused if s is no multiple of its period and lies
    within the window; else it is computed, and kept. The first step is always computed.

    Attributes:
      periods: (part, steps): a part's name as in `model.Part`, "cross" say, or that of one kind of
        block alone, "spatial.self"; the first that fits a block counts. Others are computed.
      untouched: share of the steps at either end at which all is computed, 0..0.5; in whole steps,
        rounded up.
      window: (low, high): instead of `untouched`, timesteps, 0..1000, strictly between which parts
        are reused; None for the steps.

    Source: PAB 3.2; its release's rule and VideoSys' timesteps; ASTRAEA A.2 for the share.
    """

    periods: tuple[tuple[str, int], ...] = (("self", 2), ("cross", 6))
    untouched: float = 0.15
    window: tuple[float, float] | None = None

    def __post_init__(self):
        checks.hold(
            "periods", self.periods, checks.ListOf(checks.ListOf(checks.Anything(), 2, 2), 1, 16)
        )
        for part, period in self.periods:
            checks.hold("a part's name", part, checks.Text(100))
            checks.whole(f"period of {part}", period, 1, MOST)
        checks.number("untouched", self.untouched, 0, 0.5)
        window = checks.OrNone(checks.ListOf(checks.Number(0, 1000), 2, 2))
        checks.hold("window", self.window, window)
        object.__setattr__(self, "periods", tuple(tuple(each) for each in self.periods))
        object.__setattr__(self, "window", self.window and tuple(self.window))

    @property
    def name(self) -> str:
        """What tables call it: with its periods, as "pab-2-6"."""
        return "-".join(["pab", *(str(period) for _, period in self.periods)])

    @property
    def modes(self) -> tuple[base.Mode, ...]:
        """Everything computed, then each set of parts that is reused at some step."""
        return tuple(base.DENSE._replace(reused=reused) for reused in self._sets)

    @property
    def _sets(self) -> list[tuple[str, ...]]:
        """The sets of parts that are reused together at some step; the first is of none."""
        turns = [self._reused(step) for step in range(self._cycle)]
        return list(dict.fromkeys([(), *turns]))

    @property
    def _cycle(self) -> int:
        """Steps after which the same sets come again."""
        return math.lcm(*(period for _, period in self.periods))

    def _reused(self, step: int) -> tuple[str, ...]:
        """The parts that their periods let a step reuse."""
        return tuple(part for part, period in self.periods if step % period)

    def check(self, geometry: Geometry) -> None:
        """Refuses a model without the parts that have a period."""
        there = {name for kind in geometry.kinds for name in _names(kind)}
        for part, _ in self.periods:
            if part not in there:
                raise Refusal(
                    f"{self.name} reuses {part!r}, which this model has not; it has "
                    f"{', '.join(sorted(there))}: choose other periods"
                )

    def plan(self, levels: Sequence[int], solver: Solver) -> Sequence[base.Mode]:
        """By the step's number, inside the window."""
        del levels
        steps = np.arange(solver.steps)
        inside = self._inside(steps, solver.steps, np.asarray(solver.timestep))
        return [
            base.DENSE._replace(reused=self._reused(step) if within else ())
            for step, within in zip(steps.tolist(), np.asarray(inside), strict=True)
        ]

    def decide(
        self, evaluation: base.Evaluation, inputs: base.StepInputs, state: PabState
    ) -> tuple[Int[Array, ""], PabState]:
        """The same, of a step that is data."""
        places = np.array([self._sets.index(self._reused(s)) for s in range(self._cycle)], np.int32)
        inside = self._inside(inputs.index, evaluation.steps, inputs.timestep[0])
        return jnp.where(inside, jnp.asarray(places)[inputs.index % self._cycle], 0), state

    def _inside(self, step, steps, timestep) -> Bool[Array, "*T"] | np.ndarray:
        """Whether parts are reused at a step, of numbers or of data."""
        if self.window is not None:
            low, high = self.window
            return (low < timestep) & (timestep < high) & (step > 0)
        # In whole numbers, so that a share of .15 of 20 steps is 3 of them on every device.
        share = round(self.untouched * 10_000)
        ends = (share * steps + 9_999) // 10_000
        return (step >= ends) & (step < steps - ends) & (step > 0)

    def init(self, geometry: Geometry, batch: int, dtype: jnp.dtype) -> PabState:
        """An empty stack for each part that has a period."""
        shape = (geometry.num_blocks, batch, geometry.num_tokens, geometry.width)
        parts = sorted({part.split(".")[-1] for part, period in self.periods if period > 1})
        return PabState({part: jnp.zeros(shape, dtype) for part in parts})

    def forward(
        self, mode: base.Mode, evaluation: base.Evaluation, inputs: base.StepInputs, state: PabState
    ) -> base.Forward:
        """The model, but for the parts that are reused."""
        modulation = evaluation.model.modulation(inputs.timestep, evaluation.prepared)
        tokens, side = evaluation.model.embed(inputs.latents, evaluation.prepared)

        def body(carry, block: core.Block, place: Place):
            tokens, side, outs = carry
            reused = [p for p in outs if is_reused(place.kind.name, p, mode.reused)]
            known = {}
            for part in reused:
                if part in place.kind.parts:
                    cached = token_cache.block_rows(outs[part], place.index)
                    known[part] = cached.astype(tokens.dtype)
            shared, side = blocks.shared_for(block, Rows(tokens), side, known)
            out = core.apply_block(block, Rows(tokens), shared, known=known)
            leaving, side, made = lax.optimization_barrier((out.rows, side, out.outs))
            written = {
                part: token_cache.write_block(stack, place.index, made[part])
                for part, stack in outs.items()
                if part in made and part not in known
            }
            return leaving, side, outs | written

        tokens, _, outs = blocks.run_blocks(
            evaluation, modulation, body, (tokens, side, state.outs)
        )
        trace = blocks.full_trace(evaluation.geometry, len(inputs.latents))
        trace = trace._replace(parts=blocks.part_shares(evaluation.geometry, 1.0, mode.reused))
        return base.Forward(evaluation.model.head(tokens, modulation), PabState(outs), trace)


def _names(kind: core.Kind) -> list[str]:
    """What a part of a kind of block may be called."""
    return [name for part in kind.parts for name in (part, f"{kind.name}.{part}")]
