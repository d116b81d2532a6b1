"""`astraea sensitivity`: how much each step matters."""

import pathlib

from astraea_jax.cli.options import (
    DEFAULT_SIZE,
    TINY,
    Chosen,
    ChosenSize,
    Sampling,
    SearchMethod,
    SearchSolver,
)


def command(
    *,
    output: pathlib.Path = pathlib.Path("out.png"),
    model: Chosen = TINY,
    method: SearchMethod = "step-level",
    solver: SearchSolver = "unipc",
    steps: int | None = None,
    prompts: pathlib.Path | None = None,
    count: int = 4,
    lanes: int = 4,
    size: ChosenSize = DEFAULT_SIZE,
) -> None:
    """Draws how far the video moves when one step alone is skipped (the paper's Figure 5).

    Args:
      output: A .png, .svg or .pdf file; the numbers go beside it as .json.
      model: Which model.
      method: What is reused at the skipped step.
      solver: Solver of the flow.
      steps: Denoising steps; the model's default when left out.
      prompts: A text file, one a line; the captions in the model's folder when left out.
      count: How many of them.
      lanes: Schedules denoised at a time.
      size: Of the videos.
    """
    from astraea_jax.cli import leaving_out
    from astraea_jax.cli.subject import Asked

    sampling = Sampling(steps=steps)
    asked = Asked(model, prompts, count, method, solver, sampling, size)
    leaving_out.run(asked, output, lanes)
