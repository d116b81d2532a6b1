"""The study behind `astraea bench search`: searches on some prompts, judges on others.

Schedules are searched by the error of their latents and judged by the decoded videos. Every
evaluation goes into a journal and every judgement into results.json, so that a run that was
stopped goes on where it was; the most telling work comes first.
"""

import concurrent.futures
import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from astraea_jax import methods, metrics, report, solvers
from astraea_jax.denoise import denoise
from astraea_jax.methods import Astraea, Method
from astraea_jax.population import Scorer
from astraea_jax.schedule import Schedule
from astraea_jax.search import sensitivity, study
from astraea_jax.search.evolution import SearchConfig
from astraea_jax.search.patterns import step_patterns
from astraea_jax.search.scoring import Evaluator
from astraea_jax.search.space import ALL_LEVELS, WHOLE_STEPS, Space
from astraea_jax.selection import SelectionConfig
from astraea_ports import tiny

BUDGETS = (0.3, 0.4, 0.5, 0.7)
RESULTS = "results.json"
STARTS = (3, 4, 5, 6, 8, 10, 12)
"""Dense starts of the hand-made patterns."""

METHODS: dict[str, Method] = {
    **methods.METHODS,
    "per block": Astraea(SelectionConfig(scope="block")),
    "random tokens": Astraea(SelectionConfig(rank="random")),
}
"""By the name that rows of the table know them by."""


class OutOfTime(Exception):
    """The study's minutes are over; what is done is kept."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What a study is made of; see `command`."""

    steps: int
    budgets: tuple[float, ...]
    solvers: tuple[str, ...]
    search_prompts: int
    pool: int
    seeds: tuple[int, int]
    heldout_prompts: int
    population: int
    generations: int
    swaps: int
    patience: float
    finalists: int
    rows: int
    size: tuple[int, int, int]


class Prompts(NamedTuple):
    """Noise and text of some prompts, conditional rows first."""

    noise: jax.Array
    context: jax.Array


class Study:
    """One run of the study: what is shared, and what has been found."""

    def __init__(self, pipeline, options: Options, folder: pathlib.Path, deadline: float):
        """Reads what an earlier run left in the folder."""
        self.pipeline, self.options, self.folder, self.deadline = (
            pipeline, options, folder, deadline,
        )  # fmt: skip
        self.rows = read_rows(folder)
        self.began = time.perf_counter()

    @functools.cached_property
    def chosen(self) -> list[int]:
        """The captions that are searched on: the few that stand best for a pool of them.

        They are those on which the patterns made by hand have, on the mean, the errors that they
        have on the whole pool. The pool holds none of those that are judged on.
        """
        for row in self.rows:
            if "prompts" in row:  # chosen by an earlier run
                return row["prompts"]
        number, pool = self.options.search_prompts, self.pool
        if number >= len(pool):
            return pool[:number]
        solver, chunk = self.options.solvers[0], self.options.seeds[1] * number
        patterns = [
            schedule for _, _, schedule in hand_made(self.options.steps, self.options.budgets[:2])
        ]
        levels = np.array([schedule.levels for schedule in patterns], np.int8)
        errors = []
        for at in range(0, len(pool), chunk):
            part = (pool[at : at + chunk] * chunk)[:chunk]  # as long as the rest of a search
            scorer = self._scorer(
                "step-level-corrected", solver, self._prompts([(i, 1) for i in part])
            )
            errors.append(np.log(scorer(levels))[:, : len(pool) - at])
        table = np.concatenate(errors, axis=1)
        rng = np.random.default_rng(0)
        draws = [rng.permutation(len(pool))[:number] for _ in range(20_000)]
        means = np.stack([table[:, draw].mean(axis=1) for draw in draws])
        distance = np.square(means - table.mean(axis=1)).sum(axis=1)
        found = sorted(pool[index] for index in draws[int(distance.argmin())])
        self.say(f"searching on captions {found} of a pool of {len(pool)}")
        return found

    @property
    def pool(self) -> list[int]:
        """Captions that are not judged on."""
        first = self.options.search_prompts
        judged = range(first, first + self.options.heldout_prompts)
        others = [index for index in range(len(tiny.captions())) if index not in judged]
        return others[: self.options.pool]

    @functools.cached_property
    def prompts(self) -> dict[str, Prompts]:
        """Prompts with noise: for the first look, the rest of a search, its validation, judging.

        The first two are several seeds of the same few prompts; the others have prompts of their
        own, a seed each.
        """
        options, (first, rest) = self.options, self.options.seeds
        seeds = {"first": range(1, 1 + first), "rest": range(1 + first, 1 + first + rest)}
        rows = {
            name: [(index, seed) for seed in numbers for index in self.chosen]
            for name, numbers in seeds.items()
        }
        others = [index for index in self.pool if index not in self.chosen] or self.chosen
        length = rest * options.search_prompts
        rows["validation"] = [(index, 1) for index in (others * length)[:length]]
        judged = range(options.search_prompts, options.search_prompts + options.heldout_prompts)
        rows["heldout"] = [(index, 0) for index in judged]
        return {name: self._prompts(each) for name, each in rows.items()}

    def _prompts(self, rows: Sequence[tuple[int, int]]) -> Prompts:
        """Of (prompt, seed) pairs."""
        pipeline, captions = self.pipeline, tiny.captions()
        shape = pipeline.latents_shape(*self.options.size)
        keys = [jax.random.fold_in(jax.random.key(seed), index) for index, seed in rows]
        noise = jnp.stack([jax.random.normal(key, shape) for key in keys])
        return Prompts(noise, pipeline.encode_text([captions[index] for index, _ in rows]))

    def solver(self, name: str, steps: int | None = None) -> solvers.Solver:
        """The solver's table."""
        return solvers.make(
            name, steps or self.options.steps, shift=self.pipeline.shift, grid=self.pipeline.grid
        )

    @functools.cache  # noqa: B019 - one study a process
    def scorer(self, method: str, solver: str, part: str) -> Scorer:
        """Scores on some of the prompts; exactly on those held out."""
        return self._scorer(method, solver, self.prompts[part], exact=part == "heldout")

    def _scorer(self, method: str, solver: str, prompts: Prompts, *, exact: bool = False) -> Scorer:
        return Scorer(
            self.pipeline.transformer,
            prompts.noise,
            prompts.context,
            solver=self.solver(solver),
            method=METHODS[method],
            guidance=self.pipeline.defaults.guidance,
            lanes=max(1, self.options.rows // len(prompts.context)),
            batch=self.options.population,
            precision="highest" if exact else None,
        )

    @functools.cached_property
    def _decoder(self):
        def run(vae, latents):
            pixels = (vae.decode(latents) + 1) / 2
            return jnp.rint(jnp.clip(pixels, 0, 1) * 255).astype(jnp.uint8)

        return functools.partial(jax.jit(run), self.pipeline.vae)

    def decode(self, latents) -> list[np.ndarray]:
        """Videos of latents, uint8."""
        return [np.asarray(self._decoder(latents[i : i + 1])[0]) for i in range(len(latents))]

    @functools.cache  # noqa: B019
    def dense_videos(self, solver: str) -> tuple[Any, list[np.ndarray]]:
        """Latents and videos that every row of a solver is held against."""
        dense = self.scorer("step-level-corrected", solver, "heldout").dense
        return dense, self.decode(dense)

    def judge(self, rows: Sequence[dict], *, structure: bool = True) -> None:
        """Measures rows of one solver and method on the held-out prompts; known ones are kept.

        A row says what, method, solver, budget, levels, and what its search cost.
        """
        new = [row for row in rows if _name(row) not in {_name(known) for known in self.rows}]
        if not new:
            return
        self.check_time()
        method, solver = new[0]["method"], new[0]["solver"]
        levels = np.array([row["levels"] for row in new], np.int8)
        self._measure(new, self.scorer(method, solver, "heldout").latents(levels), structure)

    def _measure(self, rows: Sequence[dict], latents, structure: bool) -> None:
        dense, references = self.dense_videos(rows[0]["solver"])
        with concurrent.futures.ThreadPoolExecutor() as pool:
            for row, found in zip(rows, latents, strict=True):
                videos = self.decode(found)
                psnr = list(pool.map(metrics.psnr, references, videos))
                row = dict(row, psnr_each=psnr, psnr=float(np.mean(psnr)), psnr_worst=min(psnr))
                row["mse"] = float(jnp.square(found - dense).mean())
                row["psnr_half_width"] = 1.96 * float(np.std(psnr, ddof=1)) / len(psnr) ** 0.5
                if structure:
                    row["ssim"] = float(np.mean(list(pool.map(metrics.ssim, references, videos))))
                self.rows.append(row)
        self.save()

    def save(self) -> None:
        """Writes what has been found."""
        about = {"environment": report.environment(), "options": dataclasses.asdict(self.options)}
        report.write_json(self.folder / RESULTS, {**about, "rows": self.rows})

    def check_time(self) -> None:
        """Stops the study when its minutes are over."""
        if time.perf_counter() > self.deadline:
            raise OutOfTime

    def say(self, words: str) -> None:
        """A line with the time."""
        print(f"[{time.perf_counter() - self.began:6.1f} s] {words}", flush=True)


def read_rows(folder: pathlib.Path) -> list[dict]:
    """What an earlier run judged; nothing where there was none."""
    path = folder / RESULTS
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def _name(row: dict) -> tuple:
    return row["what"], row["method"], row["solver"], row["budget"], tuple(row["levels"])


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
        self.evaluator = Evaluator(
            [functools.partial(self.score, "first"), functools.partial(self.score, "rest")],
            reduce="log",
            patience=self.it.options.patience,
            keep=max(2, self.it.options.population // 4),
            batch=self.it.options.population,
            record=self.journal.append,
            known={each.levels: each for each in known},
            search=name,
        )

    def score(self, part: str, levels: np.ndarray) -> np.ndarray:
        """Errors on some of the prompts, until the study's minutes are over."""
        self.it.check_time()
        return self.it.scorer(self.method, self.solver, part)(levels)

    def space(self, budget: float, choices: tuple[int, ...]) -> Space:
        """The schedules of exactly a budget."""
        return Space.for_budget(self.it.options.steps, budget, choices=choices)

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
        errors = self.score("validation", np.array([each.levels for each in finalists], np.int8))
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

    def evolve(self, what: str, budget: float, choices, given: Sequence[Schedule] = ()) -> dict:
        """Evolution, then local swaps as long as they help."""
        options, space = self.it.options, self.space(budget, choices)
        config = SearchConfig(
            population=options.population,
            parents=max(2, options.population // 4),
            generations=options.generations,
        )
        evaluator = self.fresh()
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
            if _name(row) not in {_name(known) for known in self.it.rows}:
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

    def fresh(self) -> Evaluator:
        """An evaluator that counts anew and knows what has been evaluated."""
        return dataclasses.replace(self.evaluator)

    def refined(self, space: Space, evaluator: Evaluator, first: Schedule, number: int) -> None:
        """Local swaps; what they found is known to the evaluator."""
        batch = self.it.options.population
        sensitivity.refine(space, evaluator, first, number, batch=batch)


def hand_made(steps: int, budgets: Sequence[float]) -> Iterator[tuple[str, float, Schedule]]:
    """Step patterns of several dense starts and both orders, for each budget."""
    for budget in budgets:
        for name, schedule in step_patterns(steps, round(budget * steps)).items():
            if int(name.split()[0]) in STARTS:
                yield name, budget, schedule


@dataclasses.dataclass
class Plan:
    """The study's work, part by part."""

    it: Study
    journal: study.Journal
    reuses: Sequence[str]
    found: list[dict] = dataclasses.field(default_factory=list)

    def best(self, solver: str, budget: float, *methods: str) -> Schedule | None:
        """What earlier searches judged best of some methods, by prompts that no search saw."""
        rows = [
            row
            for row in [*self.it.rows, *self.found]
            if row["solver"] == solver and row["budget"] == budget and row["method"] in methods
            and "validation" in row
        ]  # fmt: skip
        if not rows:
            return None
        return Schedule(tuple(min(rows, key=lambda row: row["validation"])["levels"]))

    def step_level(self, budgets: Sequence[float]) -> None:
        """Evolution of whole steps with each kind of reuse; the better is judged."""
        for solver in self.it.options.solvers:
            for budget in budgets:
                rows = [self.evolve(method, solver, budget, WHOLE_STEPS) for method in self.reuses]
                self.it.judge([min(rows, key=lambda row: row["validation"])])

    def evolve(self, method: str, solver: str, budget: float, choices) -> dict:
        """Evolution from the patterns made by hand, and from the best step-level schedule."""
        what = "step-level EA" if choices == WHOLE_STEPS else "EA"
        given = [schedule for _, _, schedule in hand_made(self.it.options.steps, [budget])]
        found = self.best(solver, budget, "step-level-corrected", "step-level")
        given = given if found is None else [found, *given]
        row = Searches(self.it, self.journal, method, solver).evolve(what, budget, choices, given)
        self.found.append(row)
        return row

    def token_wise(self, budgets: Sequence[float]) -> None:
        """Evolution of levels 0 to 10."""
        for solver in self.it.options.solvers:
            for budget in budgets:
                self.it.judge([self.evolve("astraea-corrected", solver, budget, ALL_LEVELS)])

    def without_search(self, method: str, choices, levels) -> None:
        """Sensitivities, dynamic programming, swaps."""
        for solver in self.it.options.solvers:
            searches = Searches(self.it, self.journal, method, solver)
            for row in searches.without_search(self.it.options.budgets, choices, levels):
                self.it.judge([row])

    def by_hand(self, method: str) -> None:
        """Patterns made by hand."""
        for solver in self.it.options.solvers:
            patterns = hand_made(self.it.options.steps, self.it.options.budgets)
            rows = [plain(f"hand-made: {name}", method, solver, b, s) for name, b, s in patterns]
            self.it.judge(rows, structure=False)
            self.it.say(f"hand-made patterns, {method}, {solver}: judged")

    def tokens(self, method: str) -> None:
        """A token-wise method on schedules that are there already."""
        steps = self.it.options.steps
        for solver in self.it.options.solvers:
            rows = []
            for budget in self.it.options.budgets:
                found = self.best(solver, budget, "astraea-corrected")
                if found is not None:
                    rows.append(plain("EA's schedule", method, solver, budget, found))
                spread = Schedule.for_budget(steps, budget, whole_steps=False)
                rows.append(plain("first fifth dense", method, solver, budget, spread))
                even = Schedule.uniform(steps, budget)
                rows.append(plain("uniform", method, solver, budget, even))
            self.it.judge(rows)
            self.it.say(f"{method}, {solver}: judged")


PARTS: dict[str, Callable[[Plan], object]] = {
    "step-level": lambda plan: plan.step_level(plan.it.options.budgets[:2]),
    "token-wise": lambda plan: plan.token_wise(plan.it.options.budgets[:2]),
    "step-level-rest": lambda plan: plan.step_level(plan.it.options.budgets[2:]),
    "by-hand": lambda plan: (plan.by_hand("step-level"), plan.by_hand("step-level-corrected")),
    "fewer-steps": lambda plan: [
        fewer_steps(plan.it, solver, budget)
        for budget in plan.it.options.budgets
        for solver in plan.it.options.solvers
    ],
    "tokens": lambda plan: [
        plan.tokens(method) for method in ("fixed-token", "random tokens", "per block", "astraea")
    ],
    "without-search": lambda plan: plan.without_search("step-level-corrected", WHOLE_STEPS, (0,)),
    "token-wise-rest": lambda plan: plan.token_wise(plan.it.options.budgets[2:]),
}
"""The study's work by name, the most telling part first."""


def run(it: Study, journal: study.Journal, parts: Sequence[str], reuses: Sequence[str]) -> None:
    """Some parts of the study in order; raises OutOfTime where the minutes end."""
    plan = Plan(it, journal, reuses)
    for part in parts:
        PARTS[part](plan)


def plain(what: str, method: str, solver: str, budget: float, schedule: Schedule) -> dict:
    """A row for `judge` that no search has cost anything."""
    row = {"what": what, "method": method, "solver": solver, "budget": budget}
    return {**row, "levels": list(schedule.levels)}


def fewer_steps(it: Study, solver: str, budget: float) -> None:
    """A row for the plain model with so many steps fewer."""
    number = round(budget * it.options.steps)
    row = {"what": "fewer dense steps", "method": "dense", "solver": solver, "budget": budget}
    row["levels"] = [10] * number
    if _name(row) in {_name(known) for known in it.rows}:
        return
    it.check_time()
    with jax.default_matmul_precision("highest"):
        latents = denoise(
            it.pipeline.transformer,
            it.prompts["heldout"].noise,
            it.prompts["heldout"].context,
            solver=it.solver(solver, number),
            guidance=it.pipeline.defaults.guidance,
        ).latents
    it._measure([row], [latents], True)
