"""`astraea generate`: a video from a text."""

import pathlib

from tyro.conf import Positional

from astraea_jax import checks
from astraea_jax.checks import Refusal
from astraea_jax.cli.options import (
    DEFAULT_SAMPLING,
    DEFAULT_SIZE,
    TINY,
    Chosen,
    ChosenSampling,
    ChosenSize,
    MethodName,
    Output,
    SolverName,
)

HEADINGS = {
    "steps": "steps",
    "tokens": "tokens computed",
    "flops": "operations",
    "seconds": "seconds, denoising",
    "speedup": "speed-up, denoising",
    "decode": "seconds, decoding",
    "compile": "seconds, compiling",
    "cache": "cache",
    "psnr": "PSNR to dense, dB",
    "ssim": "SSIM to dense",
}


def command(
    prompt: Positional[str],
    /,
    *,
    budget: float | None = None,
    compare: bool = False,
    model: Chosen = TINY,
    method: MethodName | None = None,
    schedule: pathlib.Path | None = None,
    solver: SolverName = "unipc",
    sampling: ChosenSampling = DEFAULT_SAMPLING,
    seed: int = 0,
    size: ChosenSize = DEFAULT_SIZE,
    output: Output = pathlib.Path("out.mp4"),
    show_selection: bool = False,
    compilation_cache: bool = True,
) -> None:
    """Makes a video from a text.

    Args:
      prompt: What the video shows.
      budget: Mean share of the tokens to compute, above 0 and at most 1. All when left out.
      compare: Also make the dense video, and show both and their difference side by side.
      model: Which model.
      method: How steps are computed; left out, what measured best for the budget or schedule.
      schedule: A schedule file, instead of a budget.
      solver: Solver of the flow.
      sampling: How the model is sampled.
      seed: Of the noise.
      size: Of the video.
      output: An .mp4 or .gif file.
      show_selection: Add a panel that lights up the tokens that were computed.
      compilation_cache: Keep compiled programs for the next run.
    """
    if not prompt.strip():  # a pipeline says so too, once it is open
        raise Refusal(
            f"a prompt must say something; got {checks.shown(prompt)}: describe the video to make"
        )
    asked_size = size.check()

    from astraea_jax import report
    from astraea_jax.cli import compiled, making
    from astraea_jax.cli.request import Request, read_schedule
    from astraea_jax.methods import METHODS

    if compilation_cache:
        compiled.keep()
    request = Request(
        prompt=prompt,
        model=model,
        budget=budget,
        schedule=None if schedule is None else read_schedule(schedule),
        method=None if method is None else METHODS[method],
        solver=solver,
        sampling=sampling,
        seed=seed,
        size=asked_size,
        compare=compare,
        show_selection=show_selection,
        output=output,
    )
    with report.Progress() as progress:
        rows = making.run(request, progress)
    # A column for each run: it fits the narrowest terminal, and reads as a comparison.
    lines = [
        {"what": heading} | {str(index): row.get(name) for index, row in enumerate(rows)}
        for name, heading in HEADINGS.items()
        if any(name in row for row in rows)
    ]
    columns = {"what": ""} | {str(index): row["name"] for index, row in enumerate(rows)}
    report.show(report.table(lines, columns))
    print(f"written: {output}")
