"""The plain model at every step: the reference."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from astraea_jax.methods import base
from astraea_jax.model import Geometry, Prepared, VideoDiT


@dataclasses.dataclass(frozen=True)
class Dense:
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

    def decide(self, state: Any, inputs: base.StepInputs) -> Int[Array, ""]:
        """The one mode."""
        del state, inputs
        return jnp.int32(0)

    def init(self, geometry: Geometry, batch: int, dtype: jnp.dtype) -> tuple[()]:
        """No state."""
        del geometry, batch, dtype
        return ()

    def forward(
        self,
        mode: base.Mode,
        model: VideoDiT,
        prepared: Prepared,
        geometry: Geometry,
        inputs: base.StepInputs,
        state: tuple[()],
        num_branches: int,
    ) -> base.Forward:
        """The model."""
        del mode, num_branches
        modulation = model.modulation(inputs.timestep)
        tokens = model.embed(inputs.latents)
        tokens = base.dense_tokens(model, prepared, modulation, geometry, tokens)
        trace = base.full_trace(inputs.latents.shape[0], geometry.num_tokens)
        return base.Forward(model.head(tokens, modulation), state, trace)
