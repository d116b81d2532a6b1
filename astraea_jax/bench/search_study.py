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
        self.prompts = self._all_prompts()
        self.rows = read_rows(folder)
        self.began = time.perf_counter()

    def _all_prompts(self) -> dict[str, Prompts]:
        """Prompts with noise: for the first look, the rest of a search, its validation, judging.

        The first three are several seeds of the same few prompts; what is judged on is others.
        """
        options, searched = self.options, self.options.search_prompts
        first, rest = options.seeds
        parts = {"first": (0, first), "rest": (first, rest), "validation": (first + rest, rest)}
        rows = {
            name: [(index, 1 + start + seed) for seed in range(count) for index in range(searched)]
            for name, (start, count) in parts.items()
        }
        heldout = range(searched, searched + options.heldout_prompts)
        rows["heldout"] = [(index, 0) for index in heldout]
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
        return solvers.make(name, steps or self.options.steps, shift=self.pipeline.shift)

    @functools.cache  # noqa: B019 - one study a process
    def scorer(self, method: str, solver: str, part: str) -> Scorer:
        """Scores on some of the prompts; exactly on those held out."""
        prompts = self.prompts[part]
        lanes = max(1, self.options.rows // len(prompts.context))
        return Scorer(
            self.pipeline.transformer,
            prompts.noise,
            prompts.context,
            solver=self.solver(solver),
            method=METHODS[method],
            guidance=self.pipeline.defaults.guidance,
            lanes=lanes,
            batch=self.options.population,
            precision="highest" if part == "heldout" else None,
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
        """A row for `judge`: the best on fresh noise among the best of what was asked for.

        What it cost counts every schedule asked for, known before or not.
        """
        known = [self.evaluator.known[each] for each in evaluator.asked]
        inside = [each for each in known if sum(each.levels) == space.high]
        finalists = sorted(inside, key=self.evaluator.fitness)[: self.it.options.finalists]
        errors = self.score("validation", np.array([each.levels for each in finalists], np.int8))
        validated = np.exp(np.log(errors).mean(axis=1))
        chosen = finalists[int(np.argmin(validated))]
        row = {"what": what, "method": self.method, "solver": self.solver, "budget": budget}
        row |= {"levels": list(chosen.levels), "fitness": self.evaluator.fitness(chosen)}
        row |= {"validation": float(validated.min()), "evaluations": len(evaluator.asked)}
        row["seconds"] = sum(each.seconds for each in known)
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
    """The study's work, part by part; `best` is what the parts before have found."""

    it: Study
    journal: study.Journal
    best: dict[tuple[str, str, float], Schedule]

    def evolve(self, method: str, choices, budgets: Sequence[float]) -> None:
        """Evolution from the patterns made by hand, and from the best step-level schedule."""
        what = "step-level EA" if choices == WHOLE_STEPS else "EA"
        for solver in self.it.options.solvers:
            searches = Searches(self.it, self.journal, method, solver)
            for budget in budgets:
                given = [schedule for _, _, schedule in hand_made(self.it.options.steps, [budget])]
                found = self.best.get(("step-level-corrected", solver, budget))
                given = [found, *given] if found is not None else given
                row = searches.evolve(what, budget, choices, given)
                self.best[method, solver, budget] = Schedule(tuple(row["levels"]))
                self.it.judge([row])

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
                found = self.best.get(("astraea-corrected", solver, budget))
                if found is not None:
                    rows.append(plain("EA's schedule", method, solver, budget, found))
                spread = Schedule.for_budget(steps, budget, whole_steps=False)
                rows.append(plain("first fifth dense", method, solver, budget, spread))
                even = Schedule.uniform(steps, budget)
                rows.append(plain("uniform", method, solver, budget, even))
            self.it.judge(rows)
            self.it.say(f"{method}, {solver}: judged")


def run(it: Study, journal: study.Journal) -> None:
    """All of the study, the most telling part first; raises OutOfTime where the minutes end."""
    budgets = it.options.budgets
    telling, rest = budgets[::2], budgets[1::2]
    plan = Plan(it, journal, {})
    plan.evolve("step-level-corrected", WHOLE_STEPS, budgets)
    plan.evolve("astraea-corrected", ALL_LEVELS, telling)
    plan.by_hand("step-level-corrected")
    plan.by_hand("step-level")
    for budget in budgets:
        for solver in it.options.solvers:
            fewer_steps(it, solver, budget)
    for method in ("astraea", "fixed-token", "random tokens", "per block"):
        plan.tokens(method)
    plan.without_search("step-level-corrected", WHOLE_STEPS, (0,))
    plan.evolve("step-level", WHOLE_STEPS, budgets)
    plan.evolve("astraea-corrected", ALL_LEVELS, rest)
    plan.tokens("astraea-published")
    plan.without_search("astraea-corrected", ALL_LEVELS, (0, 5))


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
