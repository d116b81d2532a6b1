"""The choices of a selection one at a time: what the defaults of `SelectionConfig` come from."""

import dataclasses

from astraea_jax.selection import SelectionConfig

_BY_STEP = SelectionConfig()
_BY_BLOCK = SelectionConfig(scope="block")

CHANGES: tuple[tuple[SelectionConfig, str, tuple], ...] = (
    (_BY_STEP, "scope", ("step",)),
    (_BY_STEP, "reuse", ("output",)),
    (_BY_STEP, "velocity", ("recomputed",)),
    (_BY_STEP, "change", ("abs", "signed")),
    (_BY_STEP, "reference", ("last_computed", "sketch")),
    (_BY_STEP, "normalise", ("none",)),
    (_BY_STEP, "lse_heads", ("max",)),
    (_BY_STEP, "w_beta", (0.0, 0.05, 5.0)),
    (_BY_BLOCK, "scope", ("block",)),
    (_BY_BLOCK, "branches", ("separate",)),
    (_BY_BLOCK, "reuse", ("output",)),
    (_BY_BLOCK, "change", ("signed",)),
    (_BY_BLOCK, "reference", ("last_computed",)),
    (_BY_BLOCK, "w_beta", (0.05,)),
)
"""A base, a field, and the values that it is given. With one selection a step the guidance
branches see the same scores in the first block, so `branches` is tried per block."""

CHOICES: dict[str, SelectionConfig] = {
    f"{base.scope}: {field} {value}": dataclasses.replace(base, **{field: value})
    for base, field, values in CHANGES
    for value in values
}
"""By the name of their rows; "step: scope step" is the default itself."""
