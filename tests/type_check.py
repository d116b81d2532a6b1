"""The type check that tests run with; conftest.py names it to jaxtyping's import hook."""

from typing import Any, Self

from beartype import BeartypeConf, FrozenDict, beartype

checked = beartype(
    conf=BeartypeConf(
        # An int is a float, as for every static type checker.
        is_pep484_tower=True,
        # The hook decorates methods one by one, where beartype can't know what Self is.
        hint_overrides=FrozenDict({Self: Any}),
    )
)
