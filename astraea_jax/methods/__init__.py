"""Acceleration methods, one file each, behind one interface."""

from astraea_jax import checks
from astraea_jax.checks import Refusal
from astraea_jax.methods.astraea import Astraea as Astraea
from astraea_jax.methods.base import Method as Method
from astraea_jax.methods.base import Mode as Mode
from astraea_jax.methods.base import Trace as Trace
from astraea_jax.methods.dense import Dense as Dense
from astraea_jax.methods.fixed_token import FixedToken as FixedToken
from astraea_jax.methods.pab import PAB as PAB
from astraea_jax.methods.step_level import StepLevel as StepLevel
from astraea_jax.methods.teacache import TeaCache as TeaCache
from astraea_jax.methods.token_wise import AstraeaState as AstraeaState
from astraea_jax.selection import PUBLISHED

METHODS = {
    "dense": Dense(),
    "astraea": Astraea(),
    "astraea-corrected": Astraea(corrects=True),
    "astraea-published": Astraea(PUBLISHED),
    "fixed-token": FixedToken(),
    "step-level": StepLevel(),
    "step-level-corrected": StepLevel(corrects=True),
    "step-level-residual": StepLevel("residual"),
    "pab-2-6": PAB(),
    "teacache-0.08": TeaCache(),
}
"""Methods by the name that commands know them by."""


def make(name: str) -> Method:
    """The method called `name`; Refusal for an unknown one."""
    if not isinstance(name, str) or name not in METHODS:
        raise Refusal(f"method must be one of {', '.join(METHODS)}; got {checks.shown(name)}")
    return METHODS[name]
