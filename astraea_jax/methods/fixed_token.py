"""FIXED-TOKEN: the ablation in which one selection a step serves every block."""

import dataclasses

from astraea_jax import selection
from astraea_jax.checks import Refusal
from astraea_jax.methods.astraea import Astraea
from astraea_jax.selection import SelectionConfig


@dataclasses.dataclass(frozen=True)
class FixedToken(Astraea):
    """ASTRAEA with one selection a step, made on the tokens that enter the first block.

    Where kinds of block split the tokens into unlike groups, there is one for each split.

    Attributes:
      selection: its scope must be "step"; by default the published choices otherwise.

    Source: ASTRAEA 4.3, FIXED-TOKEN ("at the granularity of timesteps instead of blocks").
    """

    selection: SelectionConfig = dataclasses.replace(selection.PUBLISHED, scope="step")

    def __post_init__(self):
        super().__post_init__()
        if self.selection.scope != "step":
            raise Refusal(
                f'fixed-token needs scope "step"; got {self.selection.scope!r}: use Astraea'
            )

    @property
    def name(self) -> str:
        """What tables call it."""
        return "fixed-token"
