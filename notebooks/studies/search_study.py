"""What `search.py` holds schedules against: prompts to search on, prompts to judge on.

Schedules are searched by the error of their latents and judged by the decoded videos. Every
judgement goes into results.json, so that a run that was stopped goes on where it was.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from astraea_jax import checks, files, methods, metrics, report, solvers
from astraea_jax.checks import Refusal
from astraea_jax.denoise import denoise
from astraea_jax.methods import Astraea, Method
from astraea_jax.model import fingerprint
from astraea_jax.population import Scorer
from astraea_jax.schedule import Schedule
from astraea_jax.search.evolution import SearchConfig
from astraea_jax.search.patterns import step_patterns
from astraea_jax.search.scoring import check_patience
from astraea_jax.selection import SelectionConfig
from astraea_ports import tiny
from search_choices import CHOICES

RESULTS = "results.json"

SHIPPED = pathlib.Path(__file__).with_name("search.json")
"""Every row of README.md's table, with the runs that it comes from."""

FIRST_JUDGED = 4
"""The captions judged on start here; all that are not judged on may be searched on."""

STARTS = (3, 4, 5, 6, 8, 10, 12)
"""Dense starts of the hand-made patterns."""

METHODS: dict[str, Method] = {
    **methods.METHODS,
    "per block": Astraea(SelectionConfig(scope="block")),
    "random tokens": Astraea(SelectionConfig(rank="random")),
    **{name: Astraea(config) for name, config in CHOICES.items()},
}
"""By the name that rows of the table know them by."""

COMPILERS = 8
"""Programs that are compiled side by side."""


class OutOfTime(Exception):
    """The study's minutes are over; what is done is kept."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What a study is made of; see `search.command`."""

    steps: int
    budgets: tuple[float, ...]
    solvers: tuple[str, ...]
    search_prompts: int
    pool: int
    seeds: int
    look: int
    heldout_prompts: int
    population: int
    generations: int
    swaps: int
    patience: float
    finalists: int
    rows: int
    size: tuple[int, int, int]

    def __post_init__(self):
        most = len(tiny.captions())
        for name, low, high in (
            ("search_prompts", 1, most),
            ("pool", 1, most),
            ("seeds", 1, 1000),
            ("look", 1, 1000),
            ("heldout_prompts", 2, most - FIRST_JUDGED),
            ("swaps", 0, 1_000_000),
            ("finalists", 1, 10_000),
            ("rows", 1, 100_000),
        ):
            checks.whole(name, getattr(self, name), low, high)
        check_patience(self.patience)
        # The searches' own: what is wrong with these is said now.
        SearchConfig(self.population, max(2, self.population // 4), self.generations)
        for solver in self.solvers:
            checks.one_of("solver", solver, tuple(solvers.SOLVERS))
        pool = most - self.heldout_prompts - FIRST_JUDGED
        if (
            self.search_prompts > FIRST_JUDGED + pool
            or self.search_prompts * self.seeds % self.look
        ):
            raise Refusal(
                f"expected {FIRST_JUDGED + pool} prompts to search on at most, and search prompts "
                f"times seeds a multiple of look ({self.look}); got {self.search_prompts} and "
                f"{self.seeds} seeds"
            )


class Prompts(NamedTuple):
    """Noise and text of some prompts, conditional rows first."""

    noise: jax.Array
    context: jax.Array


class Study:
    """One run of the study: what is shared, and what has been found."""

    def __init__(
        self,
        pipeline,
        options: Options,
        folder: pathlib.Path,
        deadline: float,
        rows: Sequence[dict] = (),
        elsewhere: Sequence[dict] = (),
    ):
        """Goes on from the rows that are in the folder, or from others where it holds none.

        Searches begin at what was found `elsewhere` too.
        """
        self.pipeline, self.options, self.folder, self.deadline = (
            pipeline, options, folder, deadline,
        )  # fmt: skip
        self.rows = read_rows(folder / RESULTS) or list(rows)
        self.elsewhere = elsewhere
        self.began = time.perf_counter()

    @property
    def judged(self) -> range:
        """Captions that are judged on."""
        return range(FIRST_JUDGED, FIRST_JUDGED + self.options.heldout_prompts)

    @property
    def pool(self) -> list[int]:
        """Captions that are not judged on."""
        others = [index for index in range(len(tiny.captions())) if index not in self.judged]
        return others[: self.options.pool]

    @functools.cached_property
    def chosen(self) -> list[int]:
        """The captions that are searched on: the few that stand best for a pool of them.

        They are those on which the patterns made by hand have, on the mean, the errors that they
        have on the whole pool. The pool holds none of those that are judged on.
        """
        number, pool = self.options.search_prompts, self.pool
        for row in self.rows:
            if len(row.get("prompts", ())) == number:  # chosen by an earlier run
                return row["prompts"]
        if number >= len(pool):
            return pool[:number]
        table = self._errors_by_hand(pool)
        rng = np.random.default_rng(0)
        draws = [rng.permutation(len(pool))[:number] for _ in range(20_000)]
        means = np.stack([table[:, draw].mean(axis=1) for draw in draws])
        distance = np.square(means - table.mean(axis=1)).sum(axis=1)
        found = sorted(pool[index] for index in draws[int(distance.argmin())])
        self.say(f"searching on captions {found} of a pool of {len(pool)}")
        return found

    def _errors_by_hand(self, captions: Sequence[int]) -> np.ndarray:
        """Logarithms of the patterns' errors on captions, [patterns, captions]."""
        options = self.options
        patterns = [each for _, _, each in hand_made(options.steps, options.budgets[:2])]
        levels = np.array([schedule.levels for schedule in patterns], np.int8)
        errors = []
        for part in _parts_of(options.look, [(index, 1) for index in captions], pad=True):
            scorer = self._scorer("step-level-corrected", options.solvers[0], self._prompts(part))
            errors.append(np.log(scorer(levels)))
        return np.concatenate(errors, axis=1)[:, : len(captions)]

    @functools.cached_property
    def searched(self) -> list[Prompts]:
        """What a search scores on, part by part: a schedule that fails one part ends there."""
        options = self.options
        rows = [(i, seed) for seed in range(1, 1 + options.seeds) for i in self.chosen]
        return [self._prompts(part) for part in _parts_of(options.look, rows)]

    @functools.cached_property
    def validation(self) -> list[Prompts]:
        """Prompts of the pool that no search sees: they choose among a search's finalists."""
        others = [index for index in self.pool if index not in self.chosen] or self.chosen
        rows = [(index, self.options.seeds + 1) for index in others]
        whole = len(rows) // self.options.look * self.options.look
        return [self._prompts(part) for part in _parts_of(self.options.look, rows[:whole] or rows)]

    @functools.cached_property
    def heldout(self) -> Prompts:
        """What rows are judged on."""
        return self._prompts([(index, 0) for index in self.judged])

    def _prompts(self, rows: Sequence[tuple[int, int]]) -> Prompts:
        """Of (prompt, seed) pairs."""
        pipeline, captions = self.pipeline, tiny.captions()
        shape = pipeline.latents_shape(*self.options.size)
        keys = [jax.random.fold_in(jax.random.key(seed), index) for index, seed in rows]
        noise = jnp.stack([jax.random.normal(key, shape, jnp.float32) for key in keys])
        return Prompts(noise, pipeline.encode_text([captions[index] for index, _ in rows]))

    def solver(self, name: str, steps: int | None = None) -> solvers.Solver:
        """The solver's table."""
        return solvers.make(
            name, steps or self.options.steps, shift=self.pipeline.shift, grid=self.pipeline.grid
        )

    @functools.cache  # noqa: B019 - one study a process
    def scorers(self, method: str, solver: str, *, validation: bool = False) -> list[Scorer]:
        """A score on each part of the prompts; they share one program."""
        parts = self.validation if validation else self.searched
        return [self._scorer(method, solver, prompts) for prompts in parts]

    def _scorer(self, method: str, solver: str, prompts: Prompts) -> Scorer:
        return Scorer(
            self.pipeline.transformer,
            prompts.noise,
            prompts.context,
            solver=self.solver(solver),
            method=METHODS[method],
            guidance=self.pipeline.defaults.guidance,
            lanes=max(1, self.options.rows // len(prompts.context)),
            batch=self.options.population,
        )

    def judge(self, rows: Sequence[dict], *, structure: bool = True) -> None:
        """Measures rows on the held-out prompts; known ones are kept.

        A row says what, method, solver, budget, levels, and what its search cost. Fewer levels
        than steps are a run of fewer steps. Each method is one program; several are compiled side
        by side.
        """
        known = set(map(name_of, self.rows))
        new = [row for row in rows if name_of(row) not in known]
        program = lambda row: (row["method"], len(row["levels"]))  # noqa: E731
        groups = [list(each) for _, each in itertools.groupby(sorted(new, key=program), program)]
        for solver in sorted({row["solver"] for row in new}):
            self.dense_videos(solver)
        with concurrent.futures.ThreadPoolExecutor(COMPILERS) as pool:
            runs = [pool.submit(self._denoise, group) for group in groups]
            try:
                for run in concurrent.futures.as_completed(runs):
                    self.check_time()
                    self._measure(*run.result(), structure)
            finally:
                pool.shutdown(cancel_futures=True)

    def _denoise(self, rows: Sequence[dict]) -> tuple[Sequence[dict], list[jax.Array]]:
        """Latents of rows that one program runs."""
        return rows, [
            self._latents(METHODS[row["method"]], row["solver"], row["levels"]) for row in rows
        ]

    def _latents(self, method: Method, solver: str, levels: Sequence[int]) -> jax.Array:
        if isinstance(method, Astraea):
            method = dataclasses.replace(method, traced_level="loop")  # the quickest to compile
        with jax.default_matmul_precision("highest"):
            return denoise(
                self.pipeline.transformer,
                *self.heldout,
                solver=self.solver(solver, len(levels)),
                schedule=jnp.asarray(levels, jnp.int8),
                method=method,
                guidance=self.pipeline.defaults.guidance,
            ).latents

    def _measure(self, rows: Sequence[dict], latents, structure: bool) -> None:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            for row, found in zip(rows, latents, strict=True):
                dense, references = self.dense_videos(row["solver"])
                videos = self.decode(found)
                psnr = list(pool.map(metrics.psnr, references, videos))
                row = dict(row, psnr_each=psnr, psnr=float(np.mean(psnr)), psnr_worst=min(psnr))
                row["mse"] = float(jnp.square(found - dense).mean())
                row["psnr_half_width"] = 1.96 * float(np.std(psnr, ddof=1)) / len(psnr) ** 0.5
                if structure:
                    row["ssim"] = float(np.mean(list(pool.map(metrics.ssim, references, videos))))
                self.rows.append(row)
        self.save()

    @functools.cache  # noqa: B019 - one study a process
    def dense_videos(self, solver: str) -> tuple[Any, list[np.ndarray]]:
        """Latents and videos that every row of a solver is held against."""
        dense = self._latents(METHODS["dense"], solver, [10] * self.options.steps)
        return dense, self.decode(dense)

    def decode(self, latents) -> list[np.ndarray]:
        """Videos of latents, uint8."""
        videos = (self.pipeline.decode(latents[i : i + 1])[0] for i in range(len(latents)))
        return [metrics.to_uint8(np.asarray(video)) for video in videos]

    def has(self, what: str, method: str, solver: str, budget: float) -> bool:
        """Whether such a row is judged, whatever its levels."""
        asked = what, method, solver, budget
        return any(name_of(row)[:4] == asked and "psnr" in row for row in self.rows)

    def save(self) -> None:
        """Writes what has been found."""
        about = {
            "environment": report.environment(),
            "options": dataclasses.asdict(self.options),
            "model": fingerprint(self.pipeline.transformer),
        }
        report.write_json(self.folder / RESULTS, {**about, "rows": self.rows})

    def check_time(self) -> None:
        """Stops the study when its minutes are over."""
        if time.perf_counter() > self.deadline:
            raise OutOfTime

    def say(self, words: str) -> None:
        """A line with the time."""
        print(f"[{time.perf_counter() - self.began:6.1f} s] {words}", flush=True)


def read_rows(path: pathlib.Path) -> list[dict]:
    """What an earlier run judged; nothing where there was none.

    Raises:
      Refusal: a file that holds no rows of a study.
    """
    if not os.path.exists(path):
        return []
    content = files.read_json(path, what="results.json of a study")
    rows = checks.fields(content, _RESULTS, name=str(path), required=_RESULTS, others=True)["rows"]
    for index, row in enumerate(rows):
        name = f"{path}: row {index}"
        checks.fields(row, _ROW, name=name, required=("what", "method", "solver"), others=True)
        missing = [key for key in ("budget", "levels") if key not in row]
        checks.refuse(name, [f"{key} is missing" for key in missing], "make the file again")
    return [{key: _number(key, value) for key, value in row.items()} for row in rows]


def _number(key: str, value: Any) -> Any:
    """A PSNR as a number: that of equal videos is infinite, for which JSON has only a word."""
    if not key.startswith("psnr"):
        return value
    return [float(each) for each in value] if isinstance(value, list) else float(value)


_PSNR = checks.EitherOf((checks.Number(-1e6, 1e6), checks.OneOf(("inf",))))


_ERROR = checks.EitherOf((checks.Number(0, 1e39), checks.OneOf(("inf", "nan"))))

_RESULTS = {"rows": checks.ListOf(checks.Anything(), 0, 100_000)}

_ROW = {
    **dict.fromkeys(("what", "method", "solver"), checks.Text()),
    "budget": checks.OrNone(checks.Number(0, 1)),
    "levels": checks.ListOf(checks.Whole(0, 10), 1, 10_000),
    "psnr_each": checks.ListOf(_PSNR, 1, 10_000),
    "prompts": checks.ListOf(checks.Whole(0, 10_000), 1, 10_000),
    **dict.fromkeys(("psnr", "psnr_worst"), _PSNR),
    "psnr_half_width": checks.EitherOf((checks.Number(0, 1e6), checks.OneOf(("nan", "inf")))),
    **dict.fromkeys(("ssim", "mse"), checks.Number(-1e39, 1e39)),
    **dict.fromkeys(("fitness", "validation"), _ERROR),
    "evaluations": checks.Whole(0, 100_000_000),
    "seconds": checks.Number(0, 1e9),
    "damage": checks.ListOf(checks.EitherOf((_ERROR, checks.ListOf(_ERROR, 1, 11))), 1, 10_000),
    "run": checks.Whole(0, 10_000),
}
"""What a row says that is read again."""


def name_of(row: dict) -> tuple:
    """What tells rows apart."""
    return row["what"], row["method"], row["solver"], row["budget"], tuple(row["levels"])


def hand_made(steps: int, budgets: Sequence[float]) -> list[tuple[str, float, Schedule]]:
    """Step patterns of several dense starts and both orders, for each budget."""
    return [
        (name, budget, schedule)
        for budget in budgets
        for name, schedule in step_patterns(steps, round(budget * steps)).items()
        if int(name.split()[0]) in STARTS
    ]


def _parts_of(size: int, rows: list, *, pad: bool = False) -> list[list]:
    """Rows in parts of one size, so that one program runs all; with `pad` the last repeats some."""
    if pad:
        rows = rows + rows[: -len(rows) % size]
    return [rows[at : at + size] for at in range(0, len(rows), size)]
