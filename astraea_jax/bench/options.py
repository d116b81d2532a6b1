"""Checks of the options that several benches take, before any model is loaded."""

import pathlib
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from astraea_jax import checks, files
from astraea_jax.checks import Refusal
from astraea_jax.methods import METHODS
from astraea_jax.schedule import LEVELS, check_budget

MOST_ROUNDS = 10_000
MOST_VIDEOS = 4096
"""Denoised at once: a hundred times what fills a GPU."""

_MOST_NAMED = 1000  # levels, budgets, shapes, ... of one run


def check_rounds(rounds: int) -> None:
    """Refuses a number of rounds that is none."""
    checks.whole("rounds", rounds, 1, MOST_ROUNDS)


def check_each(name: str, values: Sequence[Any], allowed: Collection[Any]) -> None:
    """Refuses values that are not of those allowed, each named once, or none at all."""
    _check_number(name, values)
    unknown = [value for value in values if value not in allowed]
    if unknown:
        known = ", ".join(map(str, allowed))
        raise Refusal(f"expected {name} of {known}; got {', '.join(map(checks.shown, unknown))}")


def check_levels(method: str, levels: Sequence[int]) -> None:
    """Refuses an unknown method, and levels that it can't do.

    Args:
      method: its name.
      levels: tenths of the tokens, 1..10.
    """
    checks.one_of("method", method, tuple(METHODS))
    _check_number("levels", levels)
    for level in levels:
        METHODS[method].static_mode(checks.whole("a level", level, 1, LEVELS))


def check_budgets(budgets: Sequence[float]) -> None:
    """Refuses shares of the tokens that are none."""
    _check_number("budgets", budgets)
    for budget in budgets:
        check_budget(budget)


def check_shares(name: str, shares: Sequence[float]) -> None:
    """Refuses shares below a millionth or above 1."""
    _check_number(name, shares)
    for share in shares:
        checks.number(f"each of {name}", share, 1e-6, 1)


def check_counts(name: str, counts: Sequence[int], most: int) -> None:
    """Refuses counts that are not in 1..most."""
    _check_number(name, counts)
    for count in counts:
        checks.whole(f"each of {name}", count, 1, most)


def check_output(
    path: pathlib.Path | None,
    suffixes: Collection[str] = (".json",),
    inputs: Iterable[pathlib.Path | None] = (),
) -> None:
    """Refuses an output that can't be written, or is one of the inputs; None is no output."""
    if path is not None:
        files.check_output(path, suffixes)
        files.check_apart(path, *inputs)


def _check_number(name: str, values: Sequence[Any]) -> None:
    if not 1 <= len(values) <= _MOST_NAMED:
        raise Refusal(f"expected 1 to {_MOST_NAMED} {name}; got {len(values)}")
