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
from collections.abc import Iterator, Sequence
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
    heldout_prompts: int
    population: int
    generations: int
    swaps: int
    lanes: int
    judge_lanes: int
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
        searched = options.search_prompts
        self.searched = self._prompts(range(searched))
        self.heldout = self._prompts(range(searched, searched + options.heldout_prompts))
        self.rows = read_rows(folder)
        self.began = time.perf_counter()

    def _prompts(self, which: range) -> Prompts:
        pipeline = self.pipeline
        shape = pipeline.latents_shape(*self.options.size)
        keys = [jax.random.fold_in(jax.random.key(0), index) for index in which]
        noise = jnp.stack([jax.random.normal(key, shape) for key in keys])
        captions = tiny.captions()
        return Prompts(noise, pipeline.encode_text([captions[index] for index in which]))

    def solver(self, name: str, steps: int | None = None) -> solvers.Solver:
        """The solver's table."""
        return solvers.make(name, steps or self.options.steps, shift=self.pipeline.shift)

    @functools.cache  # noqa: B019 - one study a process
    def scorer(self, method: str, solver: str, *, heldout: bool) -> Scorer:
        """Scores on the prompts that are searched on, or exactly on those held out."""
        prompts = self.heldout if heldout else self.searched
        return Scorer(
            self.pipeline.transformer,
            prompts.noise,
            prompts.context,
            solver=self.solver(solver),
            method=METHODS[method],
            guidance=self.pipeline.defaults.guidance,
            dense_start=1,
            lanes=self.options.judge_lanes if heldout else self.options.lanes,
            batch=4 * self.options.judge_lanes if heldout else 2 * self.options.lanes,
            precision="highest" if heldout else None,
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
        dense = self.scorer("step-level", solver, heldout=True).dense
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
        self._measure(new, self.scorer(method, solver, heldout=True).latents(levels), structure)

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
            [lambda levels: self.it.scorer(self.method, self.solver, heldout=False)(levels)],
            reduce="log",
            batch=2 * self.it.options.lanes,
            record=self.journal.append,
            known={each.levels: each for each in known},
            search=name,
        )

    def space(self, budget: float, choices: tuple[int, ...]) -> Space:
        """The schedules of exactly a budget."""
        return Space.for_budget(self.it.options.steps, budget, choices=choices)

    def row(self, what: str, budget: float, schedule: Schedule, evaluator: Evaluator) -> dict:
        """A row for `judge`; what it cost counts every schedule asked for, known before or not."""
        value = float(evaluator(schedule.array()[None])[0])
        levels = list(schedule.levels)
        row = {"what": what, "method": self.method, "solver": self.solver, "budget": budget}
        row |= {"levels": levels, "fitness": value, "evaluations": len(evaluator.asked)}
        row["seconds"] = sum(self.evaluator.known[each].seconds for each in evaluator.asked)
        self.it.say(f"{what}, {self.method}, {self.solver}, {budget:g}: {value:.5f} {levels}")
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
        best = self.refined(space, evaluator, found.best, options.swaps)
        return self.row(what, budget, best, evaluator)

    def without_search(self, budgets: Sequence[float], choices, levels) -> Iterator[dict]:
        """Dynamic programming over a sensitivity curve, then with swaps."""
        options = self.it.options
        for budget in budgets:
            # Damages add up as squared errors do, not as their logarithms.
            evaluator = dataclasses.replace(self.fresh(), reduce="mean")
            damage = sensitivity.level_sensitivity(evaluator, options.steps, levels)
            curve = {"what": "sensitivity", "method": self.method, "solver": self.solver}
            curve |= {"budget": None, "levels": list(levels), "damage": damage.tolist()}
            if _name(curve) not in {_name(row) for row in self.it.rows}:
                self.it.rows.append(curve)
            space = self.space(budget, choices)
            first = sensitivity.allocate(space, sensitivity.interpolated(damage, levels, choices))
            both = self.fresh()
            both.asked |= evaluator.asked
            yield self.row("sensitivity + DP", budget, first, both)
            best = self.refined(space, both, first, 2 * options.swaps)
            yield self.row("DP + swaps", budget, best, both)

    def fresh(self) -> Evaluator:
        """An evaluator that counts anew and knows what has been evaluated."""
        return dataclasses.replace(self.evaluator)

    def refined(self, space: Space, evaluator: Evaluator, first: Schedule, number: int) -> Schedule:
        """Local swaps, until the study's minutes are over."""

        def fitness(levels: np.ndarray) -> np.ndarray:
            self.it.check_time()
            return evaluator(levels)

        return sensitivity.refine(space, fitness, first, number, batch=2 * self.it.options.lanes)[0]


def hand_made(steps: int, budgets: Sequence[float]) -> Iterator[tuple[str, float, Schedule]]:
    """Step patterns of several dense starts and both orders, for each budget."""
    for budget in budgets:
        for name, schedule in step_patterns(steps, round(budget * steps)).items():
            if int(name.split()[0]) in STARTS:
                yield name, budget, schedule


def run(it: Study, journal: study.Journal) -> None:
    """All of the study, the most telling part first; raises OutOfTime where the minutes end."""
    options = it.options
    steps, budgets = options.steps, options.budgets

    def plain(what: str, method: str, solver: str, budget: float, schedule: Schedule) -> dict:
        row = {"what": what, "method": method, "solver": solver, "budget": budget}
        return {**row, "levels": list(schedule.levels)}

    best: dict[tuple[str, str, float], Schedule] = {}

    def remember(row: dict) -> dict:
        best[row["method"], row["solver"], row["budget"]] = Schedule(tuple(row["levels"]))
        return row

    def search(method: str, solver: str) -> Searches:
        return Searches(it, journal, method, solver)

    def whole_steps(method: str) -> None:
        for solver in options.solvers:
            searches = search(method, solver)
            for budget in budgets:
                row = searches.evolve("step-level EA", budget, WHOLE_STEPS)
                it.judge([remember(row)])

    def by_hand(method: str) -> None:
        for solver in options.solvers:
            patterns = list(hand_made(steps, budgets))
            rows = [plain(f"hand-made: {name}", method, solver, b, s) for name, b, s in patterns]
            it.judge(rows, structure=False)
            it.say(f"hand-made patterns, {method}, {solver}: judged")

    whole_steps("step-level-corrected")
    by_hand("step-level")
    whole_steps("step-level")
    by_hand("step-level-corrected")
    for solver in options.solvers:
        it.judge(
            list(search("step-level-corrected", solver).without_search(budgets, WHOLE_STEPS, (0,)))
        )
    for solver in options.solvers:
        searches = search("astraea-corrected", solver)
        for budget in budgets:
            # Levels 0 and 10 alone are in the first population, the best of their search too.
            given = [best["step-level-corrected", solver, budget]]
            it.judge([remember(searches.evolve("EA", budget, ALL_LEVELS, given))])
    for solver in options.solvers:
        searches = search("astraea-corrected", solver)
        it.judge(list(searches.without_search(budgets, ALL_LEVELS, (0, 5))))
    for method in ("astraea", "fixed-token", "per block", "astraea-published", "random tokens"):
        for solver in options.solvers:
            rows = []
            for budget in budgets:
                found = best["astraea-corrected", solver, budget]
                rows.append(plain("EA's schedule", method, solver, budget, found))
                spread = Schedule.for_budget(steps, budget, whole_steps=False)
                rows.append(plain("first fifth dense", method, solver, budget, spread))
                even = Schedule.uniform(steps, budget)
                rows.append(plain("uniform", method, solver, budget, even))
            it.judge(rows)
            it.say(f"{method}, {solver}: judged")
    for budget in budgets:
        for solver in options.solvers:
            fewer_steps(it, solver, budget)
    for solver in options.solvers:
        searches = search("astraea", solver)
        for budget in budgets:
            given = [best["step-level", solver, budget]]
            it.judge([searches.evolve("EA", budget, ALL_LEVELS, given)])


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
            it.heldout.noise,
            it.heldout.context,
            solver=it.solver(solver, number),
            guidance=it.pipeline.defaults.guidance,
        ).latents
    it._measure([row], [latents], True)
