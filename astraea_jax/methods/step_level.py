"""Whole steps computed or skipped: the TIMESTEP-LEVEL ablation and its stronger variant."""

import dataclasses
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from astraea_jax import checks
from astraea_jax.checks import Refusal
from astraea_jax.methods import base
from astraea_jax.model import Geometry, Prepared, VideoDiT


class StepLevelState(NamedTuple):
    """What a skipped step reuses; the slot that is not used has width 0.

    Attributes:
      velocity: the last velocity.
      residual: what all blocks together added to the tokens when they last ran.
    """

    velocity: Float[Array, "B N P"]
    residual: Float[Array, "B N H"]


@dataclasses.dataclass(frozen=True)
class StepLevel:
    """Level 10 runs the model, level 0 reuses; there is nothing between.

    Attributes:
      reuse: "velocity" costs nothing at a skipped step. "residual" embeds the latents, adds what
        the blocks added when they last ran, and runs the head with the current time, as TeaCache
        and MagCache do.
      correct: whether, once the next velocity is known, the steps that reused the last one are
        taken again along the line between the two; needs reuse "velocity". It costs no
        evaluation of the model.

    Source: ASTRAEA 4.3, TIMESTEP-LEVEL.
    """

    reuse: Literal["velocity", "residual"] = "velocity"
    correct: bool = False

    def __post_init__(self):
        if self.reuse not in ("velocity", "residual"):
            raise Refusal(f"reuse must be velocity or residual; got {checks.shown(self.reuse)}")
        checks.flag("correct", self.correct)
        if self.correct and self.reuse == "residual":
            raise Refusal('correct needs reuse "velocity"; got "residual": leave one out')

    @property
    def name(self) -> str:
        """What tables call it, and `METHODS`."""
        residual = "-residual" if self.reuse == "residual" else ""
        return f"step-level{residual}{'-corrected' if self.correct else ''}"

    @property
    def fresh_alike(self) -> bool:
        """A step computes every token in both guidance branches, or none."""
        return True

    @property
    def modes(self) -> tuple[base.Mode, ...]:
        """Skip or run."""
        return (base.SKIP, base.DENSE)

    def static_mode(self, level: int) -> base.Mode:
        """Skip at 0, run at 10."""
        if level not in (0, 10):
            raise base.no_level(self.name, level, "whole steps, levels 0 and 10")
        return base.DENSE if level else base.SKIP

    def decide(self, state: StepLevelState, inputs: base.StepInputs) -> Int[Array, ""]:
        """Run at level 10 and skip below."""
        del state
        return base.is_dense(inputs.level).astype(jnp.int32)

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
        model: VideoDiT,
        prepared: Prepared,
        geometry: Geometry,
        inputs: base.StepInputs,
        state: StepLevelState,
        num_branches: int,
    ) -> base.Forward:
        """The model, or what it gave when it last ran."""
        del num_branches
        batch, kept = inputs.latents.shape[0], self.reuse == "velocity"
        if mode == base.SKIP and kept:
            trace = base.empty_trace(batch, geometry.num_tokens)
            fresh = jnp.zeros((batch, geometry.num_tokens), bool)
            return base.Forward(state.velocity, state, trace, fresh)
        modulation = model.modulation(inputs.timestep)
        tokens = model.embed(inputs.latents)
        if mode == base.SKIP:
            trace = base.empty_trace(batch, geometry.num_tokens)
            velocity = model.head(tokens + state.residual, modulation)
            fresh = jnp.zeros((batch, geometry.num_tokens), bool)
            return base.Forward(velocity, state, trace, fresh)
        final = base.dense_tokens(model, prepared, modulation, geometry, tokens)
        velocity = model.head(final, modulation)
        if kept:
            state = state._replace(velocity=velocity)
        else:
            state = state._replace(residual=(final - tokens).astype(state.residual.dtype))
        fresh = jnp.ones((batch, geometry.num_tokens), bool)
        return base.Forward(velocity, state, base.full_trace(batch, geometry.num_tokens), fresh)
