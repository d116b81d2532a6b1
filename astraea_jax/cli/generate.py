"""`astraea generate`: a video, and beside it what the acceleration saved and cost."""

import contextlib
import dataclasses
import os
import pathlib
import tempfile
import warnings
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from av.error import FFmpegError

from astraea_jax import files, flops, methods, metrics, report, schedule, video
from astraea_jax.bench.models import ModelChoice
from astraea_jax.checks import Refusal
from astraea_jax.methods import Astraea, Dense, Method, StepLevel
from astraea_jax.model import fingerprint
from astraea_jax.schedule import LEVELS, Schedule
from astraea_jax.search.recipe import Recipe, recipes_in
from astraea_jax.solvers import Grid
from astraea_ports import wan
from astraea_ports.wan.plan import check_numbers


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command was asked for; None is the model's default.

    A schedule is a file's: a `Recipe` where the file says what it was searched for.
    """

    prompt: str
    model: ModelChoice
    budget: float | None
    schedule: Schedule | Recipe | None
    method: Method | None
    solver: str
    grid: Grid | None
    shift: float | None
    steps: int | None
    guidance: float | None
    negative_prompt: str
    seed: int
    size: tuple[int | None, int | None, int | None]
    compare: bool
    show_selection: bool
    output: pathlib.Path


def run(request: Request, progress: report.Progress) -> list[dict]:
    """Makes the video file; returns a table row for each run."""
    if request.budget is not None and request.schedule is not None:
        raise Refusal("expected a budget or a schedule file, got both: leave one out")
    if request.steps is not None:
        schedule.check_steps(request.steps)
    if request.budget is not None:
        schedule.check_budget(request.budget)
    check_numbers(request.seed, request.guidance, request.shift)
    video.check_output(request.output)
    with progress.stage("load the model"):
        pipeline = request.model.open()
    method, levels = plan(request, pipeline.defaults.steps, suitable(request, pipeline))
    runs: list[tuple[Method, Schedule]] = []
    if request.compare:
        runs.append((Dense(), Schedule.dense(levels.steps)))
    runs.append((method, levels))
    results = [_run(request, pipeline, *chosen, progress) for chosen in runs]
    videos = [metrics.to_uint8(np.asarray(result.video[0])) for result in results]
    rows = [_row(pipeline, *chosen, result) for chosen, result in zip(runs, results, strict=True)]
    if request.compare:
        dense, fast = (result.seconds["denoise"].run for result in results)
        rows[0]["speedup"] = 1.0
        rows[1]["speedup"] = dense / fast
        rows[1]["psnr"] = metrics.psnr(*videos)
        rows[1]["ssim"] = metrics.ssim(*videos)
    with progress.stage("write the video"):
        picture = _picture(request, pipeline, rows, videos, results[-1])
        try:
            video.write_video(request.output, picture)
        except (OSError, FFmpegError, Refusal) as error:
            latents = np.concatenate([np.asarray(result.latents) for result in results])
            kept = keep(request.output, picture, latents)
            raise Refusal(f"{_why(request.output, error)}; {kept}") from error
    return rows


def keep(output: pathlib.Path, picture: np.ndarray, latents: np.ndarray) -> str:
    """Keeps what was made where it can still be written; says where.

    Args:
      output: what could not be written.
      picture: the video; where it can't be encoded,
      latents: the latents of each run are kept.
    """
    for parent in dict.fromkeys((tempfile.gettempdir(), os.getcwd())):
        with contextlib.suppress(OSError):
            folder = pathlib.Path(tempfile.mkdtemp(prefix="astraea-", dir=parent))
            with contextlib.suppress(OSError, FFmpegError, Refusal):
                path = folder / f"video{output.suffix.lower()}"
                video.write_video(path, picture)
                return f"the video is kept as {path}"
            try:
                with files.replacing(folder / "latents.npy") as partial:
                    np.save(partial, latents)
                return f"the latents are kept as {folder / 'latents.npy'}"
            except (OSError, Refusal):
                folder.rmdir()
    return "and nowhere else is there room for what was made"


def _why(path: pathlib.Path, error: Exception) -> str:
    """Why a file was not written."""
    said = isinstance(error, Refusal)
    return str(error) if said else f"can't write {path} ({files.reason(error)})"


def suitable(request: Request, pipeline) -> list[Recipe]:
    """The searched schedules that the model carries for this model, solver and steps.

    Warns where the schedule that the request names was searched for something else.
    """
    recipes = [request.schedule] if isinstance(request.schedule, Recipe) else []
    if request.budget is not None and request.method is None and pipeline.folder is not None:
        recipes = recipes_in(pipeline.folder / "schedules")
    if not recipes:
        return []
    loader = pipeline.loaders.get("transformer")
    run = {
        "model": fingerprint(pipeline.transformer if loader is None else loader.load()),
        "solver": request.solver,
        "shift": pipeline.shift if request.shift is None else request.shift,
        "grid": pipeline.grid if request.grid is None else request.grid,
        "steps": pipeline.defaults.steps if request.steps is None else request.steps,
        "guidance": pipeline.defaults.guidance if request.guidance is None else request.guidance,
        "negative_prompt": request.negative_prompt,
    }
    if isinstance(request.schedule, Recipe):
        run["steps"] = request.schedule.schedule.steps
        differences = request.schedule.differences(**run)
        if differences:
            warnings.warn(
                f"the schedule was searched for {' and '.join(differences)}: its measured "
                "quality does not hold here",
                stacklevel=2,
            )
    return [recipe for recipe in recipes if not recipe.differences(**run)]


def plan(
    request: Request, default_steps: int, recipes: Sequence[Recipe] = ()
) -> tuple[Method, Schedule]:
    """The method and schedule that a request asks for, or those that measured best.

    With a budget and no method, a searched schedule of that budget among `recipes`; where there
    is none, whole steps are skipped: the best of the table in the README. A schedule file that
    holds levels between 0 and 10 and names no method needs ASTRAEA's selection.
    """
    asked, method, steps = request.schedule, request.method, request.steps
    if asked is not None:
        levels = asked.schedule if isinstance(asked, Recipe) else asked
        if steps not in (None, levels.steps):
            raise Refusal(
                f"the schedule has {levels.steps} levels, one a step; got {steps} steps: "
                "leave --steps out"
            )
        if isinstance(asked, Recipe):
            return method or methods.make(asked.method), levels
        whole = set(levels.levels) <= {0, LEVELS}
        return method or (SKIPPING if whole else Astraea()), levels
    steps = default_steps if steps is None else steps
    if request.budget is None:
        return method or Dense(), Schedule.dense(steps)
    if isinstance(method, Dense) and request.budget < 1:
        raise Refusal("the dense method computes every token: leave --budget or --method out")
    for recipe in recipes:
        if method is None and abs(recipe.schedule.budget - request.budget) < 1e-6:
            return methods.make(recipe.method), recipe.schedule
    method = method or SKIPPING
    whole = isinstance(method, StepLevel)
    return method, Schedule.for_budget(steps, request.budget, whole_steps=whole)


SKIPPING = StepLevel(correct=True)
"""What skips whole steps unless another method is asked for."""


def _run(request: Request, pipeline, method, levels, progress: report.Progress) -> wan.Result:
    """One run with a bar for each of its stages."""
    frames, height, width = request.size
    with _Bars(progress, method.name) as bars:
        return pipeline(
            request.prompt,
            frames=frames,
            height=height,
            width=width,
            guidance=request.guidance,
            negative_prompt=request.negative_prompt,
            seed=request.seed,
            method=method,
            schedule=levels,
            solver=request.solver,
            grid=request.grid,
            shift=request.shift,
            trace=request.show_selection,
            progress=bars,
        )


class _Bars(contextlib.ExitStack):
    """A bar for each stage of a pipeline, opened when the stage first reports."""

    def __init__(self, progress: report.Progress, method: str):
        super().__init__()
        self._progress, self._method = progress, method
        self._stage, self._bar = "", None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Takes what a pipeline reports."""
        if stage != self._stage or not done:
            self.close()
            name = f"{stage}, {self._method}" if stage == "denoise" else stage
            self._stage = stage
            self._bar = self.enter_context(self._progress.stage(name, total))
        elif self._bar is not None:
            self._bar.advance()


def _row(pipeline, method: Method, levels: Schedule, result: wan.Result) -> dict:
    """What a run computed, and how long it took."""
    frames, height, width = result.video.shape[1:4]
    workload = pipeline.workload(frames, height, width)
    branches = result.branches
    geometry = pipeline.transformer.geometry(result.latents.shape)
    dtype = pipeline.transformer.cache_dtype
    state = jax.eval_shape(lambda: method.init(geometry, branches, dtype))
    cache = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    tokens = levels.realised_budget(workload.num_tokens)
    return {
        "name": method.name,
        "steps": levels.steps,
        "tokens": f"{100 * tokens:.1f} %",
        "flops": report.human_flops(flops.run_flops(workload, levels.levels, branches=branches)),
        "seconds": result.seconds["denoise"].run,
        "compile": sum(watch.compile for watch in result.seconds.values()),
        "decode": result.seconds["decode"].run,
        "cache": report.human_bytes(cache),
    }


def _picture(
    request: Request, pipeline, rows: Sequence[dict], videos: list[np.ndarray], result: wan.Result
) -> np.ndarray:
    """Panels: dense, accelerated, their difference, the selection; or the plain video."""
    panels = [video.enlarge(frames) for frames in videos]
    titles = [f"{row['name']}, {row['tokens']}" for row in rows]
    if request.compare:
        difference, gain = video.difference(videos[0], videos[1])
        panels.append(video.enlarge(difference))
        titles.append(f"difference x {gain:g}")
    if request.show_selection:
        panels.append(video.enlarge(_lit(pipeline, result, videos[-1])))
        titles.append("tokens computed")
    if len(panels) == 1:
        return panels[0]
    return video.side_by_side(panels, titles)


def _lit(pipeline, result: wan.Result, frames: np.ndarray) -> np.ndarray:
    """The video lit by how often each token was computed, over the steps that were not dense."""
    assert result.trace, "the run was made with a trace"
    computed = np.asarray(result.trace.computed)[:, 0]
    sparse = [index for index, level in enumerate(result.schedule.levels) if level < LEVELS]
    share = computed[sparse].mean(axis=0) if sparse else computed[-1]
    grid = pipeline.transformer.geometry(result.latents.shape).grid
    mask = jax.image.resize(
        jnp.asarray(share / max(share.max(), 1e-6)).reshape(grid), (grid[0], *frames.shape[1:3]),
        "nearest",
    )  # fmt: skip
    # A latent frame stands for four frames of the video, the first one for a single frame.
    which = (np.arange(len(frames)) + pipeline.vae.config.temporal_factor - 1) // (
        pipeline.vae.config.temporal_factor
    )
    return video.light_up(frames, np.asarray(mask)[which])
