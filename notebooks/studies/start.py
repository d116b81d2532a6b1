"""How a study is run: a function's options from the command line, and a mistake in one line."""

import sys
from collections.abc import Callable

import tyro

from astraea_jax.checks import Refusal


def run(command: Callable[..., None]) -> None:
    """Calls `command` with what the command line says; a refusal ends with exit code 2."""
    try:
        tyro.cli(command)
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        sys.exit(2)
