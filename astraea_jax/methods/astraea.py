"""ASTRAEA: a share of the tokens a step, chosen by selection, the rest from the token cache."""

import dataclasses
import functools
from typing import Literal, get_args

import jax.numpy as jnp
from jax import lax

from astraea_jax import cache as token_cache
from astraea_jax import checks, selection
from astraea_jax.checks import Refusal
from astraea_jax.methods import base, blocks
from astraea_jax.methods.token_wise import AstraeaState, Run, older
from astraea_jax.model import Geometry
from astraea_jax.selection import SelectionConfig

SMALL_TENTH = 256
"""Rows below which a tenth of the tokens is too small a product to run near the machine's rate."""

TracedLevel = Literal["branch", "loop"]


@dataclasses.dataclass(frozen=True)
class Astraea(base.ByLevel):
    """Levels 1..9 compute that many tenths of the tokens in every block; 10 is the plain model.

    Keys and values are those of all tokens, fresh and stale, at every computed step. Level 0 runs
    nothing and reuses the last velocity.

    Attributes:
      selection: how tokens are chosen and what stale ones get.
      traced_level: how a level that is data runs. "branch": each level is compiled, as the static
        driver compiles it, and one of the nine runs. "loop": one program, in whose blocks the rows
        go two tenths at a time; it compiles several times faster and is as fast where a tenth is
        many rows. None: "branch" where a tenth is below `SMALL_TENTH` rows.
      corrects: whether, once a token's next velocity is known, the steps that reused its last one
        are taken again along the line between the two; needs velocity "kept".

    Source: ASTRAEA 3.2 and Algorithm 1.
    """

    selection: SelectionConfig = SelectionConfig()
    traced_level: TracedLevel | None = None
    corrects: bool = False

    def __post_init__(self):
        if not isinstance(self.selection, SelectionConfig):
            raise Refusal(
                f"selection must be a SelectionConfig; got {checks.shown(self.selection)}"
            )
        checks.one_of("traced_level", self.traced_level, (None, *get_args(TracedLevel)))
        checks.flag("corrects", self.corrects)
        if self.corrects and self.selection.velocity != "kept":
            raise Refusal(
                f'corrects needs velocity "kept"; got {self.selection.velocity!r}: there is no '
                "older velocity to correct"
            )

    @property
    def name(self) -> str:
        """What tables call it, and `METHODS` where it is there."""
        published = "-published" if self.selection == selection.PUBLISHED else ""
        return f"astraea{published}{'-corrected' if self.corrects else ''}"

    @property
    def fresh_alike(self) -> bool:
        """Whether a token is computed in both guidance branches or in none."""
        return self.selection.branches == "shared"

    @property
    def modes(self) -> tuple[base.Mode, ...]:
        """Skip, a level that is data, or the plain model."""
        return (base.SKIP, base.Mode("sparse"), base.DENSE)

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
        evaluation: base.Evaluation,
        inputs: base.StepInputs,
        state: AstraeaState,
    ) -> base.Forward:
        """The model on the selected tokens, on all, or nothing but the last velocity."""
        if mode == base.SKIP:
            return self._skip(evaluation.geometry, inputs, state)
        modulation = evaluation.model.modulation(inputs.timestep, evaluation.prepared)
        run = Run(self.selection, evaluation, modulation, inputs)
        if mode == base.DENSE:
            return run.dense(state)
        if mode.level is not None:
            return run.sparse(state, mode.level)
        if self._in_branches(evaluation.geometry):
            levels = range(1, selection.LEVELS)
            runs = [functools.partial(run.sparse, level=level) for level in levels]
            return lax.switch(inputs.level - 1, runs, state)
        return run.sparse(state, inputs.level)

    def _in_branches(self, geometry: Geometry) -> bool:
        if self.traced_level is not None:
            return self.traced_level == "branch"
        return geometry.num_tokens < SMALL_TENTH * selection.LEVELS

    def _skip(self, geometry, inputs, state) -> base.Forward:
        cache = state.cache
        if self.selection.count_skipped:
            cache = cache._replace(age=older(cache.age))
        trace = blocks.empty_trace(geometry, len(inputs.latents))
        fresh = jnp.zeros(trace.computed.shape, bool)
        return base.Forward(state.velocity, AstraeaState(cache, state.velocity), trace, fresh)
