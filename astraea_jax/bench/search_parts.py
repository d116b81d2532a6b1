"""The work of `astraea bench search`, part by part: searches, and what they are held against."""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import jax
import numpy as np

from astraea_jax.bench.search_choices import CHOICES
from astraea_jax.bench.search_study import METHODS, SHIPPED, Study, hand_made, name_of, read_rows
from astraea_jax.schedule import Schedule
from astraea_jax.search import sensitivity, study
from astraea_jax.search.evolution import SearchConfig
from astraea_jax.search.scoring import Evaluator
from astraea_jax.search.space import ALL_LEVELS, WHOLE_STEPS, Space

BUDGETS = (0.3, 0.4, 0.5, 0.7)

STEP_LEVEL, TOKEN_WISE = "step-level-corrected", "astraea-corrected"


@dataclasses.dataclass
class Searches:
    """The searches of one method and solver: they share what has been evaluated.

    The journal's earlier evaluations of the same method and solver are known from the start.
    """

    it: Study
    journal: study.Journal
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
            # Damages add up as squared errors do, not as their logarithms, and none is hopeless.
            curve = dataclasses.replace(self.fresh(), reduce="mean", patience=None)
            damage = sensitivity.level_sensitivity(curve, options.steps, levels)
            row = {"what": "sensitivity", "method": self.method, "solver": self.solver}
            row |= {"budget": None, "levels": list(levels), "damage": damage.tolist()}
            if name_of(row) not in {name_of(known) for known in self.it.rows}:
                self.it.rows.append(row)
            space = self.space(budget, choices)
            first = sensitivity.allocate(space, sensitivity.interpolated(damage, levels, choices))
            alone = dataclasses.replace(self.fresh(), patience=None)
            alone.asked |= curve.asked
            alone(first.array()[None])
            yield self.row("sensitivity + DP", budget, alone, space)
            both = self.fresh()
            both.asked |= alone.asked
            self.refined(space, both, first, 2 * options.swaps)
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


@dataclasses.dataclass
class Plan:
    """The study's work, part by part."""

    it: Study
    journal: study.Journal
    reuses: Sequence[str]

    def __post_init__(self):
        self.compiling: dict[str, Future] = {}

    def compile_early(self, compilers: concurrent.futures.Executor) -> None:
        """Compiles the searches' programs while other parts are at work."""
        solver = self.it.options.solvers[0]
        for method in dict.fromkeys([STEP_LEVEL, TOKEN_WISE, *self.reuses]):
            scorer = self.it.scorers(method, solver)[0]
            self.compiling[method] = compilers.submit(scorer.compiled)

    def searches(self, method: str, solver: str) -> Searches:
        """The searches of a method, once its program is there."""
        if method in self.compiling:
            self.compiling.pop(method).result()
        return Searches(self.it, self.journal, method, solver)

    def found(self, solver: str, budget: float) -> list[Schedule]:
        """What searches have found for a budget, the solver's own first."""
        rows = [row for row in self.it.rows if row["budget"] == budget and "fitness" in row]
        rows.sort(key=lambda row: (row["solver"] != solver, row["fitness"]))
        return [Schedule(tuple(row["levels"])) for row in rows]

    def starts(self, solver: str, budget: float) -> list[Schedule]:
        """Where a search begins: what was found before, and the patterns made by hand."""
        by_hand = [schedule for _, _, schedule in hand_made(self.it.options.steps, [budget])]
        return self.found(solver, budget) + by_hand

    def step_level(self, budgets: Sequence[float], *, again: bool = False) -> None:
        """Evolution of whole steps with each kind of reuse; the better is judged."""
        what = "step-level EA"
        for budget in budgets:
            for solver in self.it.options.solvers:
                if not again and any(self.it.has(what, r, solver, budget) for r in self.reuses):
                    continue
                starts = self.starts(solver, budget)
                rows = [
                    self.searches(method, solver).evolve(what, budget, WHOLE_STEPS, starts)
                    for method in self.reuses
                ]
                self.it.judge([min(rows, key=lambda row: row["validation"])])

    def token_wise(self, budgets: Sequence[float]) -> None:
        """Evolution of levels 0 to 10."""
        for budget in budgets:
            for solver in self.it.options.solvers:
                if self.it.has("EA", TOKEN_WISE, solver, budget):
                    continue
                searches = self.searches(TOKEN_WISE, solver)
                starts = self.starts(solver, budget)
                self.it.judge([searches.evolve("EA", budget, ALL_LEVELS, starts)])

    def without_search(self) -> None:
        """Sensitivities, dynamic programming, swaps."""
        for solver in self.it.options.solvers:
            budgets = [
                budget
                for budget in self.it.options.budgets
                if not self.it.has("DP + swaps", STEP_LEVEL, solver, budget)
            ]
            searches = self.searches(STEP_LEVEL, solver)
            for row in searches.without_search(budgets, WHOLE_STEPS, (0,)):
                self.it.judge([row])

    def by_hand(self) -> None:
        """Patterns made by hand."""
        options = self.it.options
        rows = [
            plain(f"hand-made: {name}", method, solver, budget, schedule)
            for method in ("step-level", STEP_LEVEL)
            for solver in options.solvers
            for name, budget, schedule in hand_made(options.steps, options.budgets)
        ]
        self.it.judge(rows, structure=False)
        self.it.say("hand-made patterns: judged")

    def fewer_steps(self) -> None:
        """The plain model with fewer steps."""
        options = self.it.options
        rows = [
            plain("fewer dense steps", "dense", solver, budget, Schedule.dense(number))
            for solver in options.solvers
            for budget in options.budgets
            if (number := round(budget * options.steps))
        ]
        self.it.judge(rows)
        self.it.say("fewer dense steps: judged")

    def tokens(self) -> None:
        """Token-wise methods on schedules that are there already."""
        steps, rows = self.it.options.steps, []
        for method in ("fixed-token", "random tokens", "per block", "astraea"):
            for solver in self.it.options.solvers:
                for budget in self.it.options.budgets:
                    spread = Schedule.for_budget(steps, budget, whole_steps=False)
                    rows.append(plain("first fifth dense", method, solver, budget, spread))
                    if method == "per block":
                        even = Schedule.uniform(steps, budget)
                        rows.append(plain("uniform", method, solver, budget, even))
                    # On a schedule of whole steps all selections are alike.
                    rows += [
                        plain("EA's schedule", method, solver, budget, found)
                        for found in self.found(solver, budget)[:1]
                        if set(found.levels) - set(WHOLE_STEPS)
                    ]
        self.it.judge(rows)
        self.it.say("token-wise methods: judged")

    def transfer(self) -> None:
        """The best that was found on another model, against the best made by hand there.

        So many are enough to see whether schedules outlive a change of the weights, and to choose
        the ones that a model carries until a search of its own.
        """
        for solver in self.it.options.solvers:
            for budget in self.it.options.budgets:
                rows = [
                    row
                    for row in read_rows(SHIPPED)
                    if (row["solver"], row["budget"]) == (solver, budget) and "psnr" in row
                ]
                rows.sort(key=lambda row: -row["psnr"])
                found = [row for row in rows if "fitness" in row and row["method"] in METHODS][:1]
                by_hand = [row for row in rows if row["what"].startswith("hand-made")][:3]
                self.it.judge(
                    [
                        plain(f"transfer: {row['what']}", row["method"], solver, budget, Schedule(
                            tuple(row["levels"])
                        ))
                        for row in found + by_hand
                    ]
                )  # fmt: skip
                self.it.say(f"schedules of another model, {solver}, {budget:g}: judged")

    def choices(self) -> None:
        """Each choice of the selection on the same schedules."""
        options = self.it.options
        rows = [
            plain("a choice", name, solver, budget, Schedule.for_budget(
                options.steps, budget, whole_steps=False
            ))
            for name in CHOICES
            for solver in options.solvers
            for budget in (0.3, 0.5)
        ]  # fmt: skip
        self.it.judge(rows, structure=False)
        self.it.say("choices of the selection: judged")


PARTS: dict[str, Callable[[Plan], None]] = {
    "fewer-steps": Plan.fewer_steps,
    "tokens": Plan.tokens,
    "choices": Plan.choices,
    "step-level": lambda plan: plan.step_level(plan.it.options.budgets),
    "by-hand": Plan.by_hand,
    "without-search": Plan.without_search,
    "token-wise": lambda plan: plan.token_wise(plan.it.options.budgets),
    "transfer": Plan.transfer,
    "again": lambda plan: plan.step_level(plan.it.options.budgets, again=True),
}
"""The study's work by name. "again" searches whole steps from all that was found before;
"transfer" judges on this model what was found on the one that the table is of."""

ONLY_ASKED_FOR = {"again", "transfer"}

SEARCHING = {"step-level", "without-search", "token-wise", "again"}


def run(it: Study, journal: study.Journal, parts: Sequence[str], reuses: Sequence[str]) -> None:
    """Some parts of the study in order; raises OutOfTime where the minutes end."""
    plan = Plan(it, journal, reuses)
    with concurrent.futures.ThreadPoolExecutor(1) as compilers:
        if SEARCHING & set(parts):
            plan.compile_early(compilers)
        for part in parts:
            PARTS[part](plan)


def plain(what: str, method: str, solver: str, budget: float, schedule: Schedule) -> dict:
    """A row for `judge` that no search has cost anything."""
    row = {"what": what, "method": method, "solver": solver, "budget": budget}
    return {**row, "levels": list(schedule.levels)}
