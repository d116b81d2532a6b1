"""Who is told of a running program's steps; another listener is no other program."""

import contextlib
import itertools
from collections.abc import Callable, Iterator

import numpy as np

_listeners: dict[int, Callable[[int], None]] = {}
"""Whom to tell, by the number that a running program has as data: another one causes no retrace."""

_numbers = itertools.count()


def tell_step(listener, done) -> None:
    """Called by the running program, also of a run that has ended in an error."""
    tell = _listeners.get(int(listener))
    if tell is not None:
        tell(int(done))


@contextlib.contextmanager
def listening(progress: Callable[[int], None]) -> Iterator[np.int32]:
    """A number of this run's own, under which `tell_step` finds whom to tell."""
    number = next(_numbers) % 2**31
    _listeners[number] = progress
    try:
        yield np.int32(number)
    finally:
        del _listeners[number]
