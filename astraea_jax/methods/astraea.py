"""ASTRAEA: a share of the tokens a step, chosen by selection, the rest from the token cache."""

import dataclasses
import functools
from typing import Literal, get_args

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from astraea_jax import cache as token_cache
from astraea_jax import checks, selection
from astraea_jax.checks import Refusal
from astraea_jax.methods import base
from astraea_jax.methods.token_wise import AstraeaState, Run, older
from astraea_jax.model import Geometry, Prepared, VideoDiT
from astraea_jax.selection import SelectionConfig

SMALL_TENTH = 256
"""Rows below which a tenth of the tokens is too small a product to run near the machine's rate."""

Pieces = Literal["branch", "loop", "masked"]


@dataclasses.dataclass(frozen=True)
class Astraea:
    """Levels 1..9 compute that many tenths of the tokens in every block; 10 is the plain model.

    Keys and values are those of all tokens, fresh and stale, at every computed step. Level 0 runs
    nothing and reuses the last velocity.

    Attributes:
      selection: how tokens are chosen and what stale ones get.
      pieces: how a level that is data runs. "branch": each level is compiled, as the static driver
        compiles it, and one of the nine runs. "loop": one program, in whose blocks the rows go
        two tenths at a time; it compiles several times faster and is as fast where a tenth is
        many rows. "masked": all rows, of which only the selected ones are kept, level 10 too; the
        plainest, for many schedules mapped side by side, where a branch not taken costs as much.
        None: "branch" where a tenth is below `SMALL_TENTH` rows.
      correct: whether, once a token's next velocity is known, the steps that reused its last one
        are taken again along the line between the two; needs velocity "kept".

    Source: ASTRAEA 3.2 and Algorithm 1.
    """

    selection: SelectionConfig = SelectionConfig()
    pieces: Pieces | None = None
    correct: bool = False

    def __post_init__(self):
        if not isinstance(self.selection, SelectionConfig):
            raise Refusal(
                f"selection must be a SelectionConfig; got {checks.shown(self.selection)}"
            )
        checks.one_of("pieces", self.pieces, (None, *get_args(Pieces)))
        checks.flag("correct", self.correct)
        if self.correct and self.selection.velocity != "kept":
            raise Refusal(
                f'correct needs velocity "kept"; got {self.selection.velocity!r}: there is no '
                "older velocity to correct"
            )

    @property
    def name(self) -> str:
        """What tables call it, and `METHODS` where it is there."""
        published = "-published" if self.selection == selection.PUBLISHED else ""
        return f"astraea{published}{'-corrected' if self.correct else ''}"

    @property
    def fresh_alike(self) -> bool:
        """Whether a token is computed in both guidance branches or in none."""
        return self.selection.branches == "shared"

    @property
    def modes(self) -> tuple[base.Mode, ...]:
        """Skip, a level that is data, or the plain model."""
        modes = (base.SKIP, base.Mode("sparse"), base.DENSE)
        return modes[:2] if self.pieces == "masked" else modes

    def static_mode(self, level: int) -> base.Mode:
        """A mode for each level; Refusal for a level that is none."""
        checks.whole("level", level, 0, selection.LEVELS)
        return {0: base.SKIP, 10: base.DENSE}.get(level, base.Mode("sparse", level))

    def decide(self, state: AstraeaState, inputs: base.StepInputs) -> Int[Array, ""]:
        """By the level."""
        del state
        level = inputs.level
        mode = jnp.where(base.is_dense(level), 2, jnp.where(level > 0, 1, 0)).astype(jnp.int32)
        return jnp.minimum(mode, len(self.modes) - 1)

    def init(self, geometry: Geometry, batch: int, dtype: jnp.dtype) -> AstraeaState:
        """An empty cache; it is filled by the first step, which is dense."""
        config, blocks = self.selection, geometry.num_blocks
        per_block = config.scope == "block"
        sketched = config.reference == "sketch"
        selections = blocks if per_block else len(base.splits(geometry))
        cache = token_cache.empty_cache(
            blocks=blocks,
            batch=batch,
            tokens=geometry.num_tokens,
            width=geometry.width,
            dtype=dtype,
            selections=selections,
            references=1 if config.chained else selections,
            reference_width=config.sketch_width if sketched else geometry.width,
            reference_dtype=jnp.dtype(jnp.float32) if sketched else dtype,
        )
        shape = (batch, geometry.num_tokens, geometry.patch_values)
        return AstraeaState(cache, jnp.zeros(shape, jnp.float32))

    def forward(
        self,
        mode: base.Mode,
        model: VideoDiT,
        prepared: Prepared,
        geometry: Geometry,
        inputs: base.StepInputs,
        state: AstraeaState,
        num_branches: int,
    ) -> base.Forward:
        """The model on the selected tokens, on all, or nothing but the last velocity."""
        if mode == base.SKIP:
            return self._skip(geometry, inputs, state)
        modulation = model.modulation(inputs.timestep)
        run = Run(
            self.selection, model, prepared, modulation, geometry, inputs, num_branches,
            masked=self.pieces == "masked",
        )  # fmt: skip
        if mode == base.DENSE:
            return run.dense(state)
        if mode.level is not None:
            return run.sparse(state, mode.level)
        if self._branches(geometry):
            levels = range(1, selection.LEVELS)
            runs = [functools.partial(run.sparse, level=level) for level in levels]
            return lax.switch(inputs.level - 1, runs, state)
        return run.sparse(state, inputs.level)

    def _branches(self, geometry: Geometry) -> bool:
        if self.pieces is not None:
            return self.pieces == "branch"
        return geometry.num_tokens < SMALL_TENTH * selection.LEVELS

    def _skip(self, geometry, inputs, state) -> base.Forward:
        cache = state.cache
        if self.selection.count_skipped:
            cache = cache._replace(age=older(cache.age))
        trace = base.empty_trace(inputs.latents.shape[0], geometry.num_tokens)
        fresh = jnp.zeros(trace.computed.shape, bool)
        return base.Forward(state.velocity, AstraeaState(cache, state.velocity), trace, fresh)
