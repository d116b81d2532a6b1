"""`astraea generate`: a video, and beside it what the acceleration saved and cost."""

import contextlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from av.error import FFmpegError

from astraea_jax import flops, metrics, report, video
from astraea_jax.checks import Refusal
from astraea_jax.cli import keeping
from astraea_jax.cli.request import Choice, Request
from astraea_jax.schedule import LEVELS
from astraea_ports.pipeline import Made, Result


def run(request: Request, progress: report.Progress) -> list[dict]:
    """Makes the video file; returns a table row for each run."""
    request.check()
    with progress.stage("load the model"):
        pipeline = request.model.open()
    made = _denoise(request, pipeline, progress)
    try:
        with _Bars(progress, []) as bars:
            results = pipeline.finish(made, bars)
    except Exception as error:  # whatever it is, the long work before it is done
        kept = keeping.latents([np.asarray(each.latents) for each in made])
        if isinstance(error, Refusal):
            raise Refusal(f"{error}; {kept}") from error
        error.add_note(kept)
        raise
    videos = [metrics.to_uint8(np.asarray(result.video[0])) for result in results]
    rows = [_row(pipeline, *each) for each in zip(made, results, strict=True)]
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
            latents = [np.asarray(result.latents) for result in results]
            kept = keeping.video_or_latents(request.output.suffix, picture, latents)
            raise Refusal(f"{keeping.why(request.output, error)}; {kept}") from error
    return rows


def _denoise(request: Request, pipeline, progress: report.Progress) -> list[Made]:
    """The latents of every run, with a bar for each stage; each part is loaded once."""
    choice = Choice(request, pipeline)
    frames, height, width = request.size
    asked = pipeline.plan(
        request.prompt,
        frames=frames,
        height=height,
        width=width,
        steps=choice.steps,
        guidance=request.sampling.guidance,
        negative_prompt=request.sampling.negative_prompt,
        seed=request.seed,
        solver=request.solver,
        grid=request.sampling.grid,
        shift=request.sampling.shift,
    )
    names: list[str] = []

    def choose(transformer):
        runs = choice(transformer)
        names.extend(method.name for method, _ in runs)
        return runs

    # A method with a rule of its own books what it did, not what a level says.
    named = request.named_method
    traced = request.show_selection or not (named is None or named.by_level)
    with _Bars(progress, names) as bars:
        return pipeline.denoise(asked, choose, trace=traced, progress=bars)


class _Bars(contextlib.ExitStack):
    """A bar for each stage of a pipeline, opened when the stage first reports.

    Args:
      progress: where.
      names: of the methods that denoise, one after another; known when the first one does.
    """

    def __init__(self, progress: report.Progress, names: list[str]):
        super().__init__()
        self._progress, self._names = progress, names
        self._stage, self._bar = "", None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Takes what a pipeline reports."""
        if stage != self._stage or not done:
            self.close()
            name = f"denoise, {self._names.pop(0)}" if stage == "denoise" else stage
            self._stage = stage
            self._bar = self.enter_context(self._progress.stage(name, total))
        elif self._bar is not None:
            self._bar.advance()


def _row(pipeline, made: Made, result: Result) -> dict:
    """What a run computed, and how long it took."""
    method, levels = made.method, made.schedule
    frames, height, width = result.video.shape[1:4]
    workload = pipeline.workload(frames, height, width)
    branches = result.branches
    geometry = pipeline.transformer.geometry(result.latents.shape)
    dtype = pipeline.transformer.cache_dtype
    state = jax.eval_shape(lambda: method.init(geometry, branches, dtype))
    cache = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    tokens = levels.realised_budget(workload.num_tokens)
    operations = flops.run_flops(workload, levels.levels, branches=branches)
    if not method.by_level:  # what it did is known from the run alone
        assert made.trace, "such a run is made with a trace"
        tokens = float(np.asarray(made.trace.computed).mean())
        steps = sum(flops.traced_flops(workload, made.trace))
        operations = branches * (steps + flops.text_flops(workload))
    return {
        "name": method.name,
        "steps": levels.steps,
        "tokens": f"{100 * tokens:.1f} %",
        "flops": report.human_flops(operations),
        "seconds": result.seconds["denoise"].run,
        "compile": sum(watch.compile for watch in result.seconds.values()),
        "decode": result.seconds["decode"].run,
        "cache": report.human_bytes(cache),
    }


def _picture(
    request: Request, pipeline, rows: Sequence[dict], videos: list[np.ndarray], result: Result
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


def _lit(pipeline, result: Result, frames: np.ndarray) -> np.ndarray:
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
