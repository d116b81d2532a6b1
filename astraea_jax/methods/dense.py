"""The plain model at every step: the reference."""

import dataclasses

import jax.numpy as jnp

from astraea_jax.methods import base, blocks
from astraea_jax.model import Geometry


@dataclasses.dataclass(frozen=True)
class Dense(base.ByLevel):
    """Every token of every block at every step, whatever the schedule says."""

    @property
    def name(self) -> str:
        """What tables call it."""
        return "dense"

    @property
    def modes(self) -> tuple[base.Mode, ...]:
        """One mode."""
        return (base.DENSE,)

    def static_mode(self, level: int) -> base.Mode:
        """Dense, for any level."""
        del level
        return base.DENSE

    def init(self, geometry: Geometry, batch: int, dtype: jnp.dtype) -> tuple[()]:
        """No state."""
        del geometry, batch, dtype
        return ()

    def forward(
        self,
        mode: base.Mode,
        evaluation: base.Evaluation,
        inputs: base.StepInputs,
        state: tuple[()],
    ) -> base.Forward:
        """The model."""
        del mode
        modulation = evaluation.model.modulation(inputs.timestep, evaluation.prepared)
        tokens = blocks.dense_tokens(
            evaluation, modulation, *evaluation.model.embed(inputs.latents, evaluation.prepared)
        )
        trace = blocks.full_trace(evaluation.geometry, len(inputs.latents))
        return base.Forward(evaluation.model.head(tokens, modulation), state, trace)
