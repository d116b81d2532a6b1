"""Every method at equal budget against the dense video, on fixed prompts: one table.

A table compares methods only at schedules of equal realised cost, and names each schedule: the
schedule matters more than the selection.
"""

import concurrent.futures
import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import start
from astraea_jax import checks, files, metrics, report, solvers
from astraea_jax.bench import options
from astraea_jax.checks import Refusal
from astraea_jax.denoise import denoise
from astraea_jax.methods import Astraea, Dense, Method, StepLevel
from astraea_jax.model import fingerprint
from astraea_jax.schedule import Schedule, check_steps
from astraea_jax.selection import SelectionConfig
from astraea_ports import tiny, wan

BUDGETS = (0.3, 0.5, 0.7)


def name_of(row: dict[str, Any]) -> tuple:
    """What tells a row of this table apart."""
    names = ("method", "reuse", "scope", "branches", "velocity", "rank", "pattern", "solver")
    return (*(row.get(name) for name in names), round(row["cost"], 6))


class Variant(NamedTuple):
    """A row of the table before it is measured.

    Attributes:
      method: how steps are computed.
      schedule: a level for each step; its length is the number of steps.
      pattern: what the schedule is called: "uniform", "first fifth dense", "fewer steps".
      about: further columns.
    """

    method: Method
    schedule: Schedule
    pattern: str
    about: dict[str, str]


def schedules(steps: int, budget: float, *, whole: bool) -> dict[str, Schedule]:
    """The two hand-made patterns of a budget: `whole` steps only, or any level."""
    make = Schedule.skipping if whole else Schedule.uniform
    patterns = {"uniform": make(steps, budget)}
    start = max(1, steps // 5)
    if budget * steps > start:
        patterns["first fifth dense"] = make(steps, budget, dense_steps=start)
    return patterns


def token_variants(steps: int, budget: float) -> Iterator[Variant]:
    """ASTRAEA's selection in every combination that the table asks for, and random tokens."""
    choices = itertools.product(
        ("output", "residual"), ("block", "step"), ("separate", "shared"), ("score", "random")
    )
    for reuse, scope, branches, rank in choices:
        config = SelectionConfig(
            scope=scope, branches=branches, reuse=reuse, rank=rank, velocity="recomputed"
        )
        yield from _with_patterns(config, steps, budget)
    for scope in ("block", "step"):
        config = SelectionConfig(scope=scope, branches="shared", reuse="residual", velocity="kept")
        yield from _with_patterns(config, steps, budget)


def _with_patterns(config: SelectionConfig, steps: int, budget: float) -> Iterator[Variant]:
    about = {name: getattr(config, name) for name in ("reuse", "scope", "branches", "velocity")}
    about["rank"] = config.rank
    for pattern, schedule in schedules(steps, budget, whole=False).items():
        yield Variant(Astraea(config), schedule, pattern, about)


def step_variants(steps: int, budget: float) -> Iterator[Variant]:
    """Whole steps skipped, with either reuse, and simply fewer dense steps."""
    for reuse in ("velocity", "residual"):
        for pattern, schedule in schedules(steps, budget, whole=True).items():
            yield Variant(StepLevel(reuse), schedule, pattern, {"reuse": reuse})
    yield Variant(Dense(), Schedule.dense(round(budget * steps)), "fewer steps", {})


def all_variants(steps: int, budgets: Sequence[float] = BUDGETS) -> list[Variant]:
    """Every row of the table, for one solver."""
    rows = []
    for budget in budgets:
        rows += [*token_variants(steps, budget), *step_variants(steps, budget)]
    return rows


@dataclasses.dataclass(frozen=True)
class Study:
    """What every row is measured against: the same noise, text and dense videos.

    Attributes:
      pipeline: a pipeline of `astraea_ports`.
      context: text embeddings, conditional rows first.
      noise: one video a row.
      guidance: scale of classifier-free guidance.
      decode: latents to uint8 videos.
    """

    pipeline: Any
    context: jax.Array
    noise: jax.Array
    guidance: float
    decode: Callable[[jax.Array], list[np.ndarray]]

    @classmethod
    def of(cls, pipeline, prompts: Sequence[str], *, seed: int = 0) -> "Study":
        """A study on the model's default size, each prompt with noise of its own."""
        default = pipeline.defaults
        shape = pipeline.latents_shape(default.frames, default.height, default.width)
        keys = [jax.random.fold_in(jax.random.key(seed), index) for index in range(len(prompts))]
        noise = jnp.stack([jax.random.normal(key, shape, jnp.float32) for key in keys])

        def decode(latents) -> list[np.ndarray]:
            videos = (pipeline.decode(latents[i : i + 1])[0] for i in range(len(latents)))
            return [metrics.to_uint8(np.asarray(video)) for video in videos]

        context = pipeline.encode_text(list(prompts))
        return cls(pipeline, context, noise, default.guidance, decode)

    def described(self, variant: Variant, solver: str, steps: int) -> dict[str, Any]:
        """A row before it is measured; its cost is a share of `steps` dense steps' tokens."""
        tokens = self.pipeline.transformer.geometry(self.noise.shape).num_tokens
        cost = variant.schedule.realised_budget(tokens) * variant.schedule.steps / steps
        own = {"pattern": variant.pattern, "solver": solver, "cost": cost}
        return {"method": variant.method.name, **variant.about, **own}

    def videos(self, variant: Variant, solver: str) -> tuple[list[np.ndarray], Any]:
        """The variant's videos, and its trace."""
        table = solvers.make(solver, variant.schedule.steps, shift=self.pipeline.shift)
        with jax.default_matmul_precision("highest"):  # or a GPU rounds products to TF32
            denoised = denoise(
                self.pipeline.transformer,
                self.noise,
                self.context,
                solver=table,
                schedule=variant.schedule,
                method=variant.method,
                guidance=self.guidance,
                trace=True,
            )
        return self.decode(denoised.latents), denoised.trace

    def measure(
        self,
        variants: Sequence[Variant],
        solver: str,
        *,
        steps: int,
        progress: Callable[[dict], None] = lambda row: None,
    ) -> list[dict]:
        """A row for each variant: realised cost, PSNR and SSIM over the prompts, overlap."""
        dense, _ = self.videos(Variant(Dense(), Schedule.dense(steps), "dense", {}), solver)
        rows = []
        with concurrent.futures.ThreadPoolExecutor() as pool:
            for variant in variants:
                videos, trace = self.videos(variant, solver)
                psnr = np.array(list(pool.map(metrics.psnr, dense, videos)))
                ssim = np.array(list(pool.map(metrics.ssim, dense, videos)))
                row = self.described(variant, solver, steps) | {
                    "psnr": float(psnr.mean()),
                    "psnr_half_width": float(1.96 * psnr.std(ddof=1) / len(psnr) ** 0.5),
                    "psnr_worst": float(psnr.min()),
                    "ssim": float(ssim.mean()),
                    "overlap": _overlap(variant, trace),
                    "psnr_each": [float(value) for value in psnr],
                }
                rows.append(row)
                progress(row)
        return rows


def _overlap(variant: Variant, trace) -> float | None:
    """Mean Jaccard index of consecutive blocks' selections over the steps that select."""
    selecting = [0 < level < 10 for level in variant.schedule.levels]
    if not any(selecting) or not isinstance(variant.method, Astraea):
        return None
    return float(np.asarray(trace.overlap)[selecting].mean())


def command(
    *,
    output: pathlib.Path = pathlib.Path("out.json"),
    prompts: int = 16,
    steps: int = 30,
    budgets: tuple[float, ...] = BUDGETS,
    solver: tuple[str, ...] = ("euler", "unipc"),
    only: str = "",
    known: pathlib.Path | None = None,
    model: str = "tiny",
    revision: str | None = None,
) -> None:
    """Measures every method at equal budgets against the dense video; hours on a CPU.

    Args:
      output: A .json file for every number; the table is printed.
      prompts: How many of the model's own prompts, 2..64.
      steps: Of the dense videos.
      budgets: Shares of the tokens.
      solver: Solvers to measure with.
      only: Rows whose description holds this text, as "step-level" or "random".
      known: A file of an earlier run, of the same model and prompts, whose rows are not measured
        again (one that was stopped, say); `collect.py` puts both together.
      model: A model that knows such prompts.
      revision: Of a hub id: a branch, a tag or a commit.
    """
    checks.whole("prompts", prompts, 2, len(tiny.captions()))
    check_steps(steps)
    options.check_budgets(budgets)
    options.check_each("solver", solver, tuple(solvers.SOLVERS))
    if known is not None and files.same_place(known, output):
        raise Refusal(f"--known and --output are one file, {known}: give the new rows their own")
    earlier = None if known is None else read(known)
    options.check_output(output)
    variants = [
        variant
        for variant in all_variants(steps, budgets)
        if only in " ".join([variant.method.name, *variant.about.values(), variant.pattern])
    ]
    if not variants:
        raise Refusal(f"no row's description holds {only!r}; leave --only out to see them all")
    pipeline = wan.Pipeline.from_pretrained(model, revision=revision, staged=False)
    about = {
        "environment": report.environment(),
        "model": fingerprint(pipeline.transformer),
        "options": {"prompts": prompts, "steps": steps},
    }
    before = _before(known, earlier, about)
    study = Study.of(pipeline, tiny.captions()[:prompts])
    left = {
        name: [
            each for each in variants if name_of(study.described(each, name, steps)) not in before
        ]
        for name in solver
    }
    if not any(left.values()):
        raise Refusal(f"nothing to measure: {known} holds all of them; leave --known out")
    rows: list[dict] = []
    with report.Progress() as progress:
        for name in filter(left.get, solver):
            with progress.stage(f"rows with {name}", len(left[name])) as bar:

                def keep(row: dict, bar=bar) -> None:
                    rows.append(row)
                    report.write_json(output, {**about, "rows": rows})
                    bar.advance()

                study.measure(left[name], name, steps=steps, progress=keep)
    print(report.markdown(rows, COLUMNS))


def _before(path: pathlib.Path | None, earlier: dict | None, about: dict) -> set[tuple]:
    """Names of the rows of an earlier run, which must be of the same model and options."""
    if earlier is None:
        return set()
    found = {key: earlier.get(key) for key in ("model", "options")}
    wanted = {key: about[key] for key in found}
    if found != wanted:
        raise Refusal(f"expected rows of {wanted}; {path} has those of {checks.shown(found)}")
    return {name_of(row) for row in earlier["rows"]}


def read(path: pathlib.Path) -> dict[str, Any]:
    """What a run has written, and all rows that are fit to be read again.

    Raises:
      Refusal: it is no file of this study.
    """
    content = files.read_json(path, what="file of quality.py")
    advice = "expected a file of quality.py"
    checks.fields(
        content, _RESULTS, name=str(path), required=("model", "rows"), others=True, advice=advice
    )
    for index, row in enumerate(content["rows"]):
        name = f"{path}: row {index}"
        checks.fields(row, _ROW, name=name, required=_NAMED, others=True, advice=advice)
    return content


_RESULTS = {
    "model": checks.Text(),
    "rows": checks.ListOf(checks.Anything(), 0, 100_000),
    "options": checks.ByName(checks.Whole(1, 10_000)),
}

# Of equal videos the PSNR is infinite, for which JSON has only a word.
_NUMBER = checks.EitherOf((checks.Number(-1e6, 1e6), checks.OneOf(("inf", "nan"))))

_NAMED = ("method", "solver", "pattern", "cost")

_ROW = {
    **dict.fromkeys(_NAMED[:3], checks.Text()),
    "cost": checks.Number(0, 10, above=True),
    **dict.fromkeys(
        ("reuse", "scope", "branches", "velocity", "rank"), checks.OrNone(checks.Text())
    ),
    **dict.fromkeys(("psnr", "psnr_half_width", "psnr_worst", "ssim"), _NUMBER),
    "overlap": checks.OrNone(_NUMBER),
    "psnr_each": checks.ListOf(_NUMBER, 1, 10_000),
}
"""What a row says that is read again."""


COLUMNS = {
    "method": "method",
    "reuse": "reuse",
    "scope": "scope",
    "branches": "branches",
    "velocity": "stale velocity",
    "rank": "tokens by",
    "pattern": "schedule",
    "solver": "solver",
    "cost": "tokens",
    "psnr": "PSNR dB",
    "psnr_half_width": "+-",
    "psnr_worst": "worst",
    "ssim": "SSIM",
    "overlap": "overlap",
}


if __name__ == "__main__":
    start.run(command)
