"""A search that survives: an append-only journal of every evaluation, and the state beside it.

The journal is the resume: a search draws the same schedules from the same key, and those that the
journal holds are not computed again. The state, saved by Orbax after each generation, spares the
generations that are done.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Key
from orbax import checkpoint

from astraea_jax import checks, files
from astraea_jax.checks import Refusal
from astraea_jax.schedule import LEVELS, Schedule
from astraea_jax.search import evolution
from astraea_jax.search.evolution import SearchConfig, SearchState
from astraea_jax.search.scoring import Evaluation, Evaluator
from astraea_jax.search.space import Space

JOURNAL = "journal.jsonl"
STATES = "states"

JOURNAL_BYTES = 1 << 30
"""The largest journal that is read: two million evaluations of fifty steps."""

_OPENING = b'{"header": '
"""What a journal begins with."""

_HEADER = {"header": checks.ByName(checks.Anything())}

_ERROR = checks.EitherOf((checks.Number(0, 1e39), checks.OneOf(("nan", "inf", "-inf"))))

_FIELDS = {
    "levels": checks.ListOf(checks.Whole(0, LEVELS), 1, 10_000),
    "errors": checks.ListOf(_ERROR, 1, 10_000),
    "seconds": checks.Number(0, 1e9),
    "stopped": checks.Flag(),
    "search": checks.Text(1000, empty=True),
}
"""What a line says of an evaluation."""


class Journal:
    """JSON lines: what is searched, then an evaluation a line. One process at a time may write."""

    def __init__(self, file, evaluations: list[Evaluation]):
        """Made by `open_journal`."""
        self._file = file
        self.evaluations = evaluations

    def append(self, evaluation: Evaluation) -> None:
        """Writes an evaluation through to the disk.

        Raises:
          Refusal: the disk is full or gone; what was written before is intact.
        """
        _append(self._file, dataclasses.asdict(evaluation))
        self.evaluations.append(evaluation)


@contextlib.contextmanager
def open_journal(
    folder: str | os.PathLike,
    header: Mapping[str, Any],
    *,
    steps: int | None = None,
    prompts: int | None = None,
) -> Iterator[Journal]:
    """Opens or starts the journal of a folder, and holds it until the block ends.

    Args:
      folder: made where it is missing.
      header: what the evaluations depend on: the model's fingerprint, prompts, steps, solver. A
        journal with another header is refused.
      steps: levels of each evaluation, where all have as many.
      prompts: errors of each evaluation that was not stopped, where all have as many.

    Raises:
      Refusal: a folder that can't be written, a journal that another process holds, one of
        another search, or one that is no journal.
    """
    path = files.as_path(folder) / JOURNAL
    for name, value in (("steps", steps), ("prompts", prompts)):
        if value is not None:
            checks.whole(name, value, 1, 1_000_000)
    try:
        plain = json.loads(json.dumps(checks.fields({"header": header}, _HEADER, name="header")))
    except (TypeError, RecursionError) as error:
        raise Refusal(
            f"expected JSON values in the header ({files.reason(error)}): convert them"
        ) from error
    with files.held(path) as file:
        yield Journal(file, _read(file, path, plain["header"], steps, prompts))


def _read(file, path: pathlib.Path, header: dict, steps, prompts) -> list[Evaluation]:
    """The evaluations that the file holds; writes the header into an empty one."""
    files.check_input(path, what="search journal", largest=JOURNAL_BYTES)
    file.seek(0)
    content = file.read()
    whole = content.rfind(b"\n") + 1
    lines = content[:whole].splitlines()
    if not lines and content[: len(_OPENING)] != _OPENING[: len(content)]:
        raise Refusal(f"{path} is no search journal: choose another folder")
    evaluations = _parsed(lines, path, header, steps, prompts) if lines else []
    # Only now: a file that is no journal is left as it was.
    if whole < len(content):
        warnings.warn(
            f"the last line of {path} was cut off ({len(content) - whole} bytes) and is dropped; "
            f"{len(lines)} lines are intact",
            stacklevel=4,
        )
        file.truncate(whole)
    if not lines:
        _append(file, {"header": header})
    return evaluations


def _parsed(lines: list[bytes], path: pathlib.Path, header: dict, steps, prompts):
    """The evaluations of a journal's lines, if its header is the one asked for."""
    evaluations = []
    for number, line in enumerate(lines, 1):
        found = None
        try:
            content = json.loads(line)
            if number == 1:
                found = checks.fields(content, _HEADER, name="header", required=_HEADER)["header"]
            else:
                evaluations.append(_evaluation(content, steps, prompts))
        except (ValueError, RecursionError) as error:
            raise Refusal(
                f"{path} is no search journal (line {number}: {files.reason(error)}): choose "
                "another folder"
            ) from error
        if found is not None:
            _same_search(found, header, path)
    return evaluations


def _same_search(found: dict, header: dict, path: pathlib.Path) -> None:
    differing = [key for key in {**found, **header} if found.get(key) != header.get(key)]
    if differing:
        said = "; ".join(
            f"{key}: {_short(found.get(key))} there, {_short(header.get(key))} asked for"
            for key in differing
        )
        raise Refusal(f"{path} is the journal of another search ({said}): choose another folder")


def _evaluation(line: Any, steps: int | None, prompts: int | None) -> Evaluation:
    known = checks.fields(line, _FIELDS, name="evaluation", required=_FIELDS)
    levels = Schedule(tuple(known["levels"])).levels
    errors = tuple(float(value) for value in known["errors"])
    if steps not in (None, len(levels)):
        raise Refusal(f"expected {steps} levels, one a step; got {len(levels)}")
    enough = prompts is None or known["stopped"] or len(errors) == prompts
    if not enough or len(errors) > (prompts or len(errors)):
        raise Refusal(f"expected {prompts} errors, one a prompt; got {len(errors)}")
    return Evaluation(levels, errors, float(known["seconds"]), known["stopped"], known["search"])


def _append(file, content: dict) -> None:
    """One line, there whole or (after an error) not at all."""
    # NaN is written as a word, as `float` reads it.
    plain = {
        key: [str(v) if isinstance(v, float) and not np.isfinite(v) else v for v in value]
        if isinstance(value, list | tuple)
        else value
        for key, value in content.items()
    }
    line = (json.dumps(plain) + "\n").encode()
    before = file.seek(0, os.SEEK_END)
    try:
        if file.write(line) != len(line):
            raise OSError(28, "no space left on the device")
        os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            file.truncate(before)
        raise Refusal(
            f"can't write to the journal {file.name} ({error.strerror}); what it holds is intact: "
            "make room and run again to go on"
        ) from error


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."


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
