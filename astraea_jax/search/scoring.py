"""Fitness of schedules, each computed once: memo, early stopping, and the journal's hook."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from astraea_jax import checks
from astraea_jax.checks import Refusal

Score = Callable[[np.ndarray], np.ndarray]
"""Levels int8 [S, T] -> errors float [S, prompts]: squared error against the dense videos."""

Record = Callable[["Evaluation"], None]


def check_patience(patience: float) -> float:
    """Returns `patience` if it is a factor that gives candidates up; raises Refusal otherwise."""
    return checks.number("patience", patience, 1, 1e6)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is known of one schedule.

    Attributes:
      levels: of its steps.
      errors: squared error of each prompt; fewer than the prompts when it was stopped early.
      seconds: its share of the time that its batch took.
      stopped: whether it was given up after some of the prompts.
      search: which of several searches that share a journal it belongs to: what one of them gave
        up, another has to see for itself.
    """

    levels: tuple[int, ...]
    errors: tuple[float, ...]
    seconds: float
    stopped: bool = False
    search: str = ""


def known_to(search: str, evaluations: Iterable[Evaluation]) -> dict[tuple[int, ...], Evaluation]:
    """Evaluations by levels that a search need not compute: all but what others gave up."""
    known: dict[tuple[int, ...], Evaluation] = {}
    for each in evaluations:
        if not each.stopped or (each.search == search and each.levels not in known):
            known[each.levels] = each
    return known


@dataclasses.dataclass
class Evaluator:
    """Scores populations; a schedule that was seen before costs nothing.

    Attributes:
      parts: scores on disjoint sets of prompts, computed in order; one is enough without early
        stopping.
      reduce: "mean" of the prompts' errors (the paper), or "log": the mean of their logarithms,
        which is the mean PSNR and lets no hard prompt decide alone.
      patience: with several parts, a candidate is given up when its fitness on the parts so far
        exceeds this many times that of the `keep`-th best schedule that is no dearer, on the
        same prompts (with "log" the factor is on the geometric mean); None never gives up.
      keep: see `patience`.
      batch: schedules handed to a score at a time, so that little is lost when a run is killed.
      record: called with each new evaluation, in order.
      known: evaluations by levels; filled from a journal to resume.
      search: written into each evaluation.

    Raises:
      Refusal: no part, or a number out of range.
    """

    parts: Sequence[Score]
    reduce: Literal["mean", "log"] = "mean"
    patience: float | None = None
    keep: int = 10
    batch: int = 64
    record: Record = lambda evaluation: None
    known: dict[tuple[int, ...], Evaluation] = dataclasses.field(default_factory=dict)
    search: str = ""

    def __post_init__(self):
        if not self.parts:
            raise Refusal("expected at least one part to score on; got none")
        checks.whole("batch", self.batch, 1, 1_000_000, unit="schedules")
        checks.whole("keep", self.keep, 1, 1_000_000, unit="schedules")
        checks.one_of("reduce", self.reduce, ("mean", "log"))
        if self.patience is not None:
            check_patience(self.patience)
            if len(self.parts) < 2:
                raise Refusal("patience looks at a first part: it needs at least two; got one")
        self.evaluations = 0  # computed by this evaluator
        self.rejected = 0  # of those, not finite
        self.asked: set[tuple[int, ...]] = set()  # computed or known

    def __call__(self, levels: Int[np.ndarray, "S T"]) -> Float[np.ndarray, "S"]:
        """Fitness of each schedule, lower is better; infinite where it is not a number.

        Raises:
          Refusal: every schedule so far has given NaN or infinity.
        """
        rows = [tuple(int(level) for level in row) for row in levels]
        self.asked.update(rows)
        fresh = [row for row in dict.fromkeys(rows) if row not in self.known]
        for first in range(0, len(fresh), self.batch):
            for evaluation in self._evaluate(fresh[first : first + self.batch]):
                self.record(evaluation)
                self.known[evaluation.levels] = evaluation
        if self.known and not any(np.isfinite(self.fitness(each)) for each in self.known.values()):
            raise Refusal(
                f"none of {len(self.known)} schedules has a finite error: the model gives NaN or "
                "infinite latents; check its weights and dtype"
            )
        return np.array([self.fitness(self.known[row]) for row in rows])

    def fitness(self, evaluation: Evaluation) -> float:
        """One number for an evaluation; infinite for one that was stopped or is not finite."""
        return np.inf if evaluation.stopped else self._reduced(evaluation.errors)

    def _reduced(self, errors: Sequence[float]) -> float:
        values = np.asarray(errors, np.float64)
        if not np.isfinite(values).all():
            return np.inf
        if self.reduce == "mean":
            return float(values.mean())
        return float(np.exp(np.log(np.maximum(values, 1e-30)).mean()))

    def _evaluate(self, rows: list[tuple[int, ...]]) -> list[Evaluation]:
        began = time.perf_counter()
        errors: list[list[float]] = [[] for _ in rows]
        running = list(range(len(rows)))
        for part, score in enumerate(self.parts):
            if part:
                running = [i for i in running if not self._hopeless(rows[i], errors[i])]
            if not running:
                break
            found = np.asarray(score(np.array([rows[index] for index in running], np.int8)))
            for index, values in zip(running, found, strict=True):
                errors[index] += [float(value) for value in values]
        seconds = (time.perf_counter() - began) / len(rows)
        going = set(running)
        self.evaluations += len(rows)
        self.rejected += sum(not np.isfinite(self._reduced(each)) for each in errors)
        return [
            Evaluation(row, tuple(errors[index]), seconds, index not in going, self.search)
            for index, row in enumerate(rows)
        ]

    def _hopeless(self, levels: tuple[int, ...], errors: Sequence[float]) -> bool:
        """Whether the prompts so far say that a schedule will not be among the best.

        It is held against schedules that compute no more tokens: a dearer one is no rival. Nor is
        one that this evaluator was never asked for: what another search has found must not end
        this one.
        """
        rivals = [
            each.errors[: len(errors)]
            for each in self.known.values()
            if not each.stopped and each.levels in self.asked and sum(each.levels) <= sum(levels)
        ]
        if self.patience is None or len(rivals) < self.keep:
            return False
        best = sorted(map(self._reduced, rivals))
        return self._reduced(errors) > self.patience * best[self.keep - 1]
