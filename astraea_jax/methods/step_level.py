"""Whole steps computed or skipped: the TIMESTEP-LEVEL ablation and its stronger variant."""

import dataclasses
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from astraea_jax import checks
from astraea_jax.checks import Refusal
from astraea_jax.methods import base, blocks
from astraea_jax.model import Geometry


class StepLevelState(NamedTuple):
    """What a skipped step reuses; the slot that is not used has width 0.

    Attributes:
      velocity: the last velocity.
      residual: what all blocks together added to the tokens when they last ran.
    """

    velocity: Float[Array, "B N P"]
    residual: Float[Array, "B N H"]


@dataclasses.dataclass(frozen=True)
class StepLevel(base.ByLevel):
    """Level 10 runs the model, level 0 reuses; there is nothing between.

    Attributes:
      reuse: "velocity" costs nothing at a skipped step. "residual" embeds the latents, adds what
        the blocks added when they last ran, and runs the head with the current time, as TeaCache
        and MagCache do.
      corrects: whether, once the next velocity is known, the steps that reused the last one are
        taken again along the line between the two; needs reuse "velocity". It costs no
        evaluation of the model.

    Source: ASTRAEA 4.3, TIMESTEP-LEVEL.
    """

    reuse: Literal["velocity", "residual"] = "velocity"
    corrects: bool = False

    fresh_alike = True  # every token in both guidance branches, or none

    def __post_init__(self):
        if self.reuse not in ("velocity", "residual"):
            raise Refusal(f"reuse must be velocity or residual; got {checks.shown(self.reuse)}")
        checks.flag("corrects", self.corrects)
        if self.corrects and self.reuse == "residual":
            raise Refusal('corrects needs reuse "velocity"; got "residual": leave one out')

    @property
    def name(self) -> str:
        """What tables call it, and `METHODS`."""
        residual = "-residual" if self.reuse == "residual" else ""
        return f"step-level{residual}{'-corrected' if self.corrects else ''}"

    @property
    def modes(self) -> tuple[base.Mode, ...]:
        """Skip or run."""
        return (base.SKIP, base.DENSE)

    def static_mode(self, level: int) -> base.Mode:
        """Skip at 0, run at 10."""
        if level not in (0, 10):
            raise base.no_level(self.name, level, "whole steps, levels 0 and 10")
        return base.DENSE if level else base.SKIP

    def init(self, geometry: Geometry, batch: int, dtype: jnp.dtype) -> StepLevelState:
        """Zeros."""
        kept = self.reuse == "velocity"
        patch, width = (geometry.patch_values, 0) if kept else (0, geometry.width)
        return StepLevelState(
            jnp.zeros((batch, geometry.num_tokens, patch), jnp.float32),
            jnp.zeros((batch, geometry.num_tokens, width), dtype),
        )

    def forward(
        self,
        mode: base.Mode,
        evaluation: base.Evaluation,
        inputs: base.StepInputs,
        state: StepLevelState,
    ) -> base.Forward:
        """The model, or what it gave when it last ran."""
        batch = len(inputs.latents)
        computed = mode != base.SKIP
        trace = (blocks.full_trace if computed else blocks.empty_trace)(evaluation.geometry, batch)
        fresh = jnp.full((batch, evaluation.geometry.num_tokens), computed, bool)
        if self.reuse == "residual":
            run = blocks.run_residual if computed else blocks.reuse_residual
            velocity, residual = run(evaluation, inputs, state.residual)
            return base.Forward(velocity, state._replace(residual=residual), trace, fresh)
        if computed:
            modulation = evaluation.model.modulation(inputs.timestep, evaluation.prepared)
            tokens, side = evaluation.model.embed(inputs.latents, evaluation.prepared)
            tokens = blocks.dense_tokens(evaluation, modulation, tokens, side)
            state = state._replace(velocity=evaluation.model.head(tokens, modulation))
        return base.Forward(state.velocity, state, trace, fresh)
