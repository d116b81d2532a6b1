"""The work of `search.py`, part by part: searches, and what they are held against."""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from astraea_jax.schedule import Schedule
from astraea_jax.search import journal as journals
from astraea_jax.search.space import ALL_LEVELS, WHOLE_STEPS
from search_choices import CHOICES
from search_runs import Searches
from search_study import METHODS, Study, hand_made

BUDGETS = (0.3, 0.4, 0.5, 0.7)

STEP_LEVEL, TOKEN_WISE = "step-level-corrected", "astraea-corrected"


@dataclasses.dataclass
class Plan:
    """The study's work, part by part."""

    it: Study
    journal: journals.Journal
    reuses: Sequence[str]

    def __post_init__(self):
        self.compiling: dict[str, Future] = {}

    def compile_early(self, parts: Sequence[str], compilers: concurrent.futures.Executor) -> None:
        """Compiles what the searches will need while other parts are at work."""
        reuses = tuple(self.reuses)
        needed = {"without-search": (STEP_LEVEL,), "token-wise": (TOKEN_WISE,)}
        needed |= {"step-level": reuses, "again": reuses}
        solver = self.it.options.solvers[0]
        for method in {method: None for part in parts for method in needed.get(part, ())}:
            scorer = self.it.scorers(method, solver)[0]
            self.compiling[method] = compilers.submit(scorer.compiled)

    def searches(self, method: str, solver: str) -> Searches:
        """The searches of a method, once its program is there."""
        if method in self.compiling:
            self.compiling.pop(method).result()
        return Searches(self.it, self.journal, method, solver)

    def found(self, solver: str, budget: float) -> list[Schedule]:
        """What searches have found for a budget, the solver's own first."""
        return found_in(self.it.rows, solver, budget)

    def starts(self, solver: str, budget: float) -> list[Schedule]:
        """Where a search begins: what was found before, here or elsewhere, and by hand."""
        by_hand = [schedule for _, _, schedule in hand_made(self.it.options.steps, [budget])]
        elsewhere = found_in(self.it.elsewhere, solver, budget)
        return self.found(solver, budget) + elsewhere + by_hand

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
        self.it.judge(rows)
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
        """The best that was found elsewhere, against the best made by hand there.

        So many are enough to see whether schedules outlive a change of the weights, and to choose
        the ones that a model carries until a search of its own.
        """
        for solver in self.it.options.solvers:
            for budget in self.it.options.budgets:
                rows = [
                    row
                    for row in self.it.elsewhere
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
"transfer" judges on this model what another study found."""

ONLY_ASKED_FOR = {"again", "transfer"}


def run(it: Study, journal: journals.Journal, parts: Sequence[str], reuses: Sequence[str]) -> None:
    """Some parts of the study in order; raises OutOfTime where the minutes end."""
    plan = Plan(it, journal, reuses)
    with concurrent.futures.ThreadPoolExecutor(1) as compilers:
        plan.compile_early(parts, compilers)
        for part in parts:
            PARTS[part](plan)


def found_in(rows: Sequence[dict], solver: str, budget: float) -> list[Schedule]:
    """What searches among some rows have found for a budget, the solver's own first."""
    found = [row for row in rows if row["budget"] == budget and "fitness" in row]
    found.sort(key=lambda row: (row["solver"] != solver, float(row["fitness"])))
    return [Schedule(tuple(row["levels"])) for row in found]


def plain(what: str, method: str, solver: str, budget: float, schedule: Schedule) -> dict:
    """A row for `judge` that no search has cost anything."""
    row = {"what": what, "method": method, "solver": solver, "budget": budget}
    return {**row, "levels": list(schedule.levels)}
