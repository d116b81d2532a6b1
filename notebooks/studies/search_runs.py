"""The searches of a study: evolution, dynamic programming, swaps, and the choice at their end."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from astraea_jax.schedule import Schedule
from astraea_jax.search import journal as journals
from astraea_jax.search import sensitivity, study
from astraea_jax.search.evolution import SearchConfig
from astraea_jax.search.scoring import Evaluator
from astraea_jax.search.space import Space
from search_study import Study, hand_made, name_of


@dataclasses.dataclass
class Searches:
    """The searches of one method and solver: they share what has been evaluated.

    The journal's earlier evaluations of the same method and solver are known from the start.
    """

    it: Study
    journal: journals.Journal
    method: str
    solver: str

    def __post_init__(self):
        name = f"{self.method}, {self.solver}"
        known = [each for each in self.journal.evaluations if each.search == name]
        parts = range(len(self.it.searched))
        self.evaluator = Evaluator(
            [functools.partial(self.score, part) for part in parts],
            reduce="log",
            patience=self.it.options.patience if len(parts) > 1 else None,
            keep=max(2, self.it.options.population // 4),
            batch=self.it.options.population,
            record=self.journal.append,
            known={each.levels: each for each in known},
            search=name,
        )

    def score(self, part: int, levels: np.ndarray) -> np.ndarray:
        """Errors on some of the prompts, until the study's minutes are over."""
        self.it.check_time()
        return self.it.scorers(self.method, self.solver)[part](levels)

    def space(self, budget: float, choices: tuple[int, ...]) -> Space:
        """The schedules of exactly a budget."""
        return Space.for_budget(self.it.options.steps, budget, choices=choices)

    def fresh(self) -> Evaluator:
        """An evaluator that counts anew and knows what has been evaluated."""
        return dataclasses.replace(self.evaluator)

    def evolve(self, what: str, budget: float, choices, starts: Sequence[Schedule]) -> dict:
        """Evolution from the best of some schedules, then local swaps as long as they help."""
        options, space = self.it.options, self.space(budget, choices)
        evaluator = self.fresh()
        inside = [each for each in dict.fromkeys(starts) if _in_space(space, each)]
        fitness = evaluator(np.array([each.levels for each in inside], np.int8))
        given = [inside[index] for index in np.argsort(fitness)[: options.population // 4]]
        config = SearchConfig(
            population=options.population,
            parents=max(2, options.population // 4),
            generations=options.generations,
        )
        found = study.evolve(
            space, config, evaluator, jax.random.key(0), given=tuple(given),
            deadline=self.it.deadline,
        )  # fmt: skip
        self.refined(space, evaluator, found.best, options.swaps)
        return self.row(what, budget, evaluator, space)

    def without_search(self, budgets: Sequence[float], choices, levels) -> Iterator[dict]:
        """Dynamic programming over a sensitivity curve, then with swaps."""
        options = self.it.options
        for budget in budgets:
            # What another search gave up because of its own finds, this one has to see itself.
            whole = {each: seen for each, seen in self.evaluator.known.items() if not seen.stopped}
            both = dataclasses.replace(self.evaluator, known=whole)
            # Damages add up as squared errors do, not as their logarithms, and none is hopeless.
            curve = dataclasses.replace(both, reduce="mean", patience=None)
            damage = sensitivity.level_sensitivity(curve, options.steps, levels)
            row = {"what": "sensitivity", "method": self.method, "solver": self.solver}
            row |= {"budget": None, "levels": list(levels), "damage": damage.tolist()}
            if name_of(row) not in {name_of(known) for known in self.it.rows}:
                self.it.rows.append(row)
            space = self.space(budget, choices)
            first = sensitivity.allocate(space, sensitivity.interpolated(damage, levels, choices))
            alone = dataclasses.replace(both, patience=None)
            alone.asked |= curve.asked
            alone(first.array()[None])
            self.evaluator.known.update(whole)
            yield self.row("sensitivity + DP", budget, alone, space)
            both.asked |= alone.asked
            self.refined(space, both, first, 2 * options.swaps)
            self.evaluator.known.update(whole)
            yield self.row("DP + swaps", budget, both, space)

    def refined(self, space: Space, evaluator: Evaluator, first: Schedule, number: int) -> None:
        """Local swaps; what they found is known to the evaluator."""
        batch = self.it.options.population
        sensitivity.refine(space, evaluator, first, number, batch=batch)

    def row(self, what: str, budget: float, evaluator: Evaluator, space: Space) -> dict:
        """A row for `judge`: the best on other prompts among the best of what was asked for.

        What it cost counts every schedule asked for, known before or not.
        """
        known = [self.evaluator.known[each] for each in evaluator.asked]
        inside = [each for each in known if sum(each.levels) == space.high]
        finalists = sorted(inside, key=self.evaluator.fitness)[: self.it.options.finalists]
        if len(inside) > 1:
            by_hand = {each.levels for _, _, each in hand_made(space.steps, [budget])}
            finalists += [
                each for each in inside if each.levels in by_hand - {f.levels for f in finalists}
            ]
        levels = np.array([each.levels for each in finalists], np.int8)
        parts = self.it.scorers(self.method, self.solver, validation=True)
        errors = np.concatenate([score(levels) for score in parts], axis=1)
        validated = np.exp(np.log(errors).mean(axis=1))
        chosen = finalists[int(np.argmin(validated))]
        row = {"what": what, "method": self.method, "solver": self.solver, "budget": budget}
        row |= {"levels": list(chosen.levels), "fitness": self.evaluator.fitness(chosen)}
        row |= {"validation": float(validated.min()), "evaluations": len(evaluator.asked)}
        row |= {"seconds": sum(each.seconds for each in known), "prompts": self.it.chosen}
        self.it.say(
            f"{what}, {self.method}, {self.solver}, {budget:g}: {row['fitness']:.5f} "
            f"{row['validation']:.5f} {row['levels']}"
        )
        return row


def _in_space(space: Space, schedule: Schedule) -> bool:
    try:
        space.genes(schedule)
    except ValueError:
        return False
    return True
