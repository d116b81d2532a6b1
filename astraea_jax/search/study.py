"""A search that survives: its state is saved by Orbax after each generation.

The journal alone would do, see `journal`; the state spares the generations that are done.
"""

import os
import pathlib
import shutil
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Key
from orbax import checkpoint

from astraea_jax import checks, files
from astraea_jax.checks import Refusal
from astraea_jax.schedule import Schedule
from astraea_jax.search import evolution
from astraea_jax.search.evolution import SearchConfig, SearchState
from astraea_jax.search.scoring import Evaluation, Evaluator
from astraea_jax.search.space import Space

STATES = "states"


class Generation(NamedTuple):
    """What is known after a generation.

    Attributes:
      number: 0 is the first population.
      best: the best schedule so far.
      fitness: its fitness.
      evaluations: computed so far, those of the journal included.
      seconds: since this process started the search.
      left: estimated seconds to the end.
    """

    number: int
    best: Schedule
    fitness: float
    evaluations: int
    seconds: float
    left: float


def evolve(
    space: Space,
    config: SearchConfig,
    evaluator: Evaluator,
    key: Key[Array, ""],
    *,
    given: tuple[Schedule, ...] = (),
    states: str | os.PathLike | None = None,
    progress: Callable[[Generation], None] = lambda generation: None,
    deadline: float | None = None,
) -> Generation:
    """Runs the search to its last generation.

    Args:
      space: where to search.
      config: how.
      evaluator: scores schedules; its journal's evaluations are not computed again.
      key: everything random comes from it.
      given: schedules for the first population.
      states: folder for the states of finished generations; None keeps none.
      progress: called after each generation.
      deadline: `time.perf_counter()` after which no generation is started; the state stays as
        it is, to go on later.

    Returns:
      The last generation.

    Raises:
      Refusal: no space or config, states that are no folder, or no schedule has a finite error.
    """
    for name, value, kind in (("space", space, Space), ("config", config, SearchConfig)):
        if not isinstance(value, kind):
            raise Refusal(f"{name} must be a {kind.__name__}; got {checks.shown(value)}")
    there = None if states is None else files.as_path(states)
    if there is not None and os.path.lexists(there) and not os.path.isdir(there):
        raise Refusal(f"expected a folder for states; {states} is none: choose another folder")
    began = time.perf_counter()
    saved = _restore(states, space, config) if states is not None else None
    state = evolution.start(space, config, key) if saved is None else saved
    first = int(state.generation) + (saved is not None)
    result = None if saved is None else _generation(space, state, evaluator, began, 0.0)
    for number in range(first, config.generations + 1):
        if deadline is not None and result is not None and time.perf_counter() > deadline:
            break
        if number == 0:
            genes = evolution.initial_population(space, config, jax.random.fold_in(key, 0), given)
        else:
            genes, state = evolution.next_children(space, config, state)
        if len(genes):
            fitness = evaluator(space.levels(genes))
            if not (np.isfinite(fitness).any() or np.isfinite(state.best_fitness)):
                raise Refusal(
                    f"none of the {len(genes)} first schedules has a finite error, or passed the "
                    "first look: check the model's numbers, or raise the patience"
                )
            state = evolution.survive(config, state, genes, fitness)
        else:  # a small space is exhausted
            state = state._replace(generation=state.generation + 1)
        if states is not None:
            _save(states, state)
        done = number - first + 1
        left = (time.perf_counter() - began) / done * (config.generations - number)
        result = _generation(space, state, evaluator, began, left)
        progress(result)
    assert result is not None, "the first population is always scored"
    return result


def _generation(space, state: SearchState, evaluator: Evaluator, began, left) -> Generation:
    return Generation(
        number=int(state.generation),
        best=space.schedule(np.asarray(state.best_genes)),
        fitness=float(state.best_fitness),
        evaluations=len(evaluator.known),
        seconds=time.perf_counter() - began,
        left=left,
    )


def _save(folder: str | os.PathLike, state: SearchState) -> None:
    """Saves the state of a generation, then forgets the one before."""
    base = pathlib.Path(folder).absolute()
    number = int(state.generation)
    try:
        base.mkdir(parents=True, exist_ok=True)
        with checkpoint.StandardCheckpointer() as saver:
            saver.save(base / str(number), state._asdict(), force=True)
    except OSError as error:
        raise Refusal(
            f"can't save the search's state in {base} ({error}); its journal is intact"
        ) from error
    for old in _numbers(base):
        if old < number:
            _remove(base / str(old))


def _restore(folder: str | os.PathLike, space: Space, config: SearchConfig) -> SearchState | None:
    """The newest state that can be read; None to start anew, which the journal makes quick."""
    base = pathlib.Path(folder).absolute()
    key = jax.random.key(0)
    like = jax.tree.map(np.asarray, evolution.start(space, config, key)._asdict())
    for number in sorted(_numbers(base), reverse=True):
        try:
            with checkpoint.StandardCheckpointer() as saver:
                state = SearchState(**saver.restore(base / str(number), like))
            return _checked(state, number, space)
        except (OSError, KeyError, TypeError, ValueError) as error:
            warnings.warn(
                f"the state {base / str(number)} can't be read ({type(error).__name__}); "
                "going on from the journal",
                stacklevel=3,
            )
    return None


def _checked(state: SearchState, number: int, space: Space) -> SearchState:
    """The state, if it is that of a generation of this space."""
    best = np.asarray(state.best_genes)
    genes = np.concatenate([state.genes, best[None]])
    inside = (genes >= 0).all() and (genes < len(space.choices)).all()
    if int(state.generation) != number or not inside or not space.holds(best):
        raise ValueError("not a generation of this search")
    return state


def _numbers(base: pathlib.Path) -> list[int]:
    """Generations saved whole: Orbax renames a folder to its number when it is complete."""
    return [int(path.name) for path in base.glob("*") if path.name.isdecimal()]


def _remove(folder: pathlib.Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def pareto(evaluations: list[Evaluation], fitness: Callable[[Evaluation], float]) -> list[dict]:
    """The evaluations that no other beats in both cost and fitness, by rising cost."""
    points = sorted(
        (sum(each.levels), fitness(each), each.levels)
        for each in evaluations
        if np.isfinite(fitness(each))
    )
    front: list[dict] = []
    for cost, value, levels in points:
        if not front or value < front[-1]["fitness"]:
            budget = cost / (10 * len(levels))
            front.append({"budget": budget, "fitness": value, "levels": list(levels)})
    return front


def describe(result: Generation) -> str:
    """A line for a terminal."""
    left = f", about {result.left:.0f} s left" if result.left else ""
    return (
        f"generation {result.number}: fitness {result.fitness:.4g} at budget "
        f"{result.best.budget:.3f}, {result.evaluations} evaluations, {result.seconds:.0f} s{left}"
    )
