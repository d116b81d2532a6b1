"""`astraea search`: a schedule for a model, a budget and a machine."""

import pathlib
from typing import Literal

from astraea_jax.cli.options import (
    DEFAULT_SAMPLING,
    DEFAULT_SIZE,
    TINY,
    Chosen,
    ChosenSampling,
    ChosenSize,
    SearchMethod,
    SearchSolver,
)


def command(
    *,
    budget: float | None = None,
    speedup: float | None = None,
    seconds: float | None = None,
    output: pathlib.Path = pathlib.Path("out.json"),
    folder: pathlib.Path = pathlib.Path("out_search"),
    model: Chosen = TINY,
    method: SearchMethod = "step-level-corrected",
    solver: SearchSolver = "unipc",
    sampling: ChosenSampling = DEFAULT_SAMPLING,
    prompts: pathlib.Path | None = None,
    count: int = 4,
    heldout: int = 4,
    population: int = 50,
    parents: int = 10,
    generations: int = 30,
    replacement: Literal["plus", "generational"] = "plus",
    swaps: int = 200,
    sensitivities: bool = False,
    band: tuple[float, float] | None = None,
    dense_start: int = 1,
    fitness: Literal["latents", "pixels"] = "latents",
    reduce: Literal["mean", "log"] = "log",
    patience: float | None = None,
    lanes: int = 4,
    seed: int = 0,
    size: ChosenSize = DEFAULT_SIZE,
    distributed: bool = False,
) -> None:
    """Searches a schedule that keeps the video nearest to the dense one at a given cost.

    Args:
      budget: Mean share of the tokens to compute,
      speedup: or how many times faster than dense to denoise,
      seconds: or seconds of denoising, both by step times measured on this machine.
      output: The schedule file.
      folder: For the journal, the state and the picture; a search that was stopped goes on there.
      model: Which model.
      method: What computes the steps; the step-level ones compute whole steps or skip them.
      solver: Solver of the flow.
      sampling: How the model is sampled.
      prompts: A text file, one a line; the captions in the model's folder when left out.
      count: Prompts to search on, the first of the file,
      heldout: and prompts after them that the result is measured on, at least 1.
      population: Children of a generation.
      parents: Survivors that they are made from.
      generations: How many.
      replacement: "plus": parents compete with children. "generational": they do not.
      swaps: Evaluations of a local refinement at the end.
      sensitivities: Put the search-free schedule into the first population; costs T evaluations.
      band: Least and largest cost as shares of the target; exact for a budget, .9 1 for time.
      dense_start: Leading dense steps that every schedule has.
      fitness: Compare latents, or decoded pixels.
      reduce: Mean error of the prompts as the paper, or mean of its logarithm (mean PSNR).
      patience: Give a candidate up when its first prompt is this many times worse than the best.
      lanes: Schedules denoised at a time on each device.
      seed: Of the search.
      size: Of the videos.
      distributed: Share the work with the other processes of jax.distributed.
    """
    from astraea_jax.cli import searching
    from astraea_jax.cli.subject import Asked
    from astraea_jax.cli.target import Target
    from astraea_jax.search.evolution import SearchConfig

    searching.run(
        searching.Search(
            target=Target(budget, speedup, seconds),
            config=SearchConfig(population, parents, generations, replacement=replacement),
            asked=Asked(model, prompts, count + heldout, method, solver, sampling, size),
            output=output,
            folder=folder,
            heldout=heldout,
            swaps=swaps,
            sensitivities=sensitivities,
            band=band,
            dense_start=dense_start,
            fitness=fitness,
            reduce=reduce,
            patience=patience,
            lanes=lanes,
            seed=seed,
            distributed=distributed,
        )
    )
