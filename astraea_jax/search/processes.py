"""Schedules scored by the processes of `jax.distributed`: one searches, the others help.

Process 0 runs the search and holds its journal. The others call `help_score` and compute their
share of whatever it scores until it is done.
"""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float, Int

Score = Callable[[np.ndarray], np.ndarray]


class SharedScore:
    """A score that all processes compute a share of; call it on process 0 only.

    Within `with SharedScore(score) as shared:` the helpers are waiting; they leave at the end.
    """

    def __init__(self, score: Score):
        """Shares `score`, levels [S, T] to errors [S, prompts]."""
        self._score = score

    def __call__(self, levels: Int[np.ndarray, "S T"]) -> Float[np.ndarray, "S prompts"]:
        """Errors of all schedules."""
        _from_leader(np.array(levels.shape, np.int32))
        return _share(self._score, _from_leader(levels.astype(np.int8)))

    def __enter__(self) -> "SharedScore":
        """The helpers are expected to be in `help_score`."""
        return self

    def __exit__(self, *_) -> None:
        """Tells the helpers that there is no more."""
        _from_leader(np.zeros(2, np.int32))


def help_score(score: Score) -> int:
    """Computes shares until process 0 leaves its `with`; returns how many batches it took."""
    batches = 0
    while True:
        number, steps = _from_leader(np.zeros(2, np.int32))
        if number == 0:
            return batches
        _share(score, _from_leader(np.zeros((int(number), int(steps)), np.int8)))
        batches += 1


def _from_leader(value: np.ndarray) -> np.ndarray:
    return np.asarray(multihost_utils.broadcast_one_to_all(value))


def _share(score: Score, levels: np.ndarray) -> np.ndarray:
    """This process's part of the rows, dealt by cost; then everybody's."""
    number, index = jax.process_count(), jax.process_index()
    rows = -(-len(levels) // number)
    filled = np.zeros((rows * number, levels.shape[1]), np.int8)
    filled[: len(levels)] = levels
    by_cost = np.argsort(-filled.astype(int).sum(axis=1), kind="stable")
    mine = np.asarray(score(filled[by_cost[index::number]]), np.float32)
    found = np.asarray(multihost_utils.process_allgather(mine))
    errors = np.zeros((rows * number, mine.shape[1]))
    for process, part in enumerate(found):
        errors[by_cost[process::number]] = part
    return errors[: len(levels)]
