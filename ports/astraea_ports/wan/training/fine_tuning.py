"""A Wan model fine-tuned on clips with captions: the front door of training.

from astraea_ports.wan import training

tuned = training.fine_tune("tiny", clips, captions, folder="run", steps=200)
pipeline = wan.Pipeline.from_pretrained(tuned.model)
before, after = tuned.held_out(other_clips, their_captions)
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from astraea_jax import checks, files
from astraea_jax.checks import Refusal
from astraea_ports.training import clips as own
from astraea_ports.training.clips import Source
from astraea_ports.training.folder import check_some, owned, saved_steps
from astraea_ports.training.losses import read_losses
from astraea_ports.training.recipe import MOST_STEPS, Recipe
from astraea_ports.training.run import check_minutes, run, set_minutes
from astraea_ports.wan.training import measures
from astraea_ports.wan.training.measures import HeldOut
from astraea_ports.wan.training.settings import check_memory, check_model, gentle, plan_for
from astraea_ports.wan.training.transformer import PoolPlan, Sheet, TransformerTraining

Clips = Float[np.ndarray | Array, "P F height width 3"]


@dataclasses.dataclass(frozen=True)
class FineTuned:
    """A fine-tuning as far as it has come.

    Attributes:
      model: folder of the trained model in the Diffusers layout; every pipeline opens it.
      folder: of the run: loss.png, sheet.png, checkpoints.
      losses: of each step so far, on the clips that were learned.
      steps: of the whole run; the same call goes on where fewer are done.
      recipe: how it was trained.
      start: the model that it started from.
      revision: of that, on the hub.
    """

    model: Path
    folder: Path
    losses: Float[np.ndarray, " done"]
    steps: int
    recipe: Recipe
    start: str
    revision: str | None = None

    @property
    def done(self) -> bool:
        """Whether it came to its last step."""
        return len(self.losses) >= self.steps

    def held_out(self, clips: Clips, captions: Sequence[str], *, seed: int = 0) -> HeldOut:
        """The loss before and after, on clips that were not learned, at the same noise.

        Args:
          clips: in [0, 1], of a size that the model can do.
          captions: one a clip.
          seed: of the noise.

        Raises:
          Refusal: as `measures.held_out_loss`.
        """
        before, after = (
            measures.held_out_loss(
                model, clips, captions, recipe=self.recipe, seed=seed, revision=revision
            )
            for model, revision in ((self.start, self.revision), (self.model, None))
        )
        return HeldOut(before, after)


def fine_tune(
    model: str | os.PathLike[str],
    clips: Clips | Source,
    captions: Sequence[str] | None = None,
    *,
    folder: str | os.PathLike[str],
    steps: int | None = None,
    minutes: float | None = None,
    sitting: float | None = None,
    batch: int | None = None,
    rate: float | None = None,
    seed: int | None = None,
    recipe: Recipe | None = None,
    sheet: Sheet | None = None,
    plan: PoolPlan | None = None,
    data: Mapping[str, Any] | None = None,
    checkpoint_every: float = 2.0,
    revision: str | None = None,
    say: Callable[[str], None] = print,
) -> FineTuned:
    """Trains a Wan's transformer and text encoder on clips, or goes on with the run in the folder.

    All weights move, by flow matching; what is left is their moving average, in bfloat16. A run
    that was stopped, in whatever way, goes on from its last checkpoint when it is called again with
    the same arguments, as if it had never stopped.

    Args:
      model: "tiny", a folder in the Diffusers layout, or a hub id.
      clips: [P, F, height, width, 3] floats in [0, 1]; of Wan F is 4k + 1, height and width are
        multiples of 16. Or an endless stream: `source(first, count)` gives `Examples`.
      captions: one a clip; None for a stream, which has its own.
      folder: of the run: checkpoints, loss.png, sheet.png, and the result as model/.
      steps: length of the run; 200 where neither this nor minutes are given.
      minutes: length of the run, measured on this machine before it begins.
      sitting: minutes after which to stop with a checkpoint; None for never.
      batch: clips a step; two for each device when left out.
      rate: factor on the step sizes, above 0 and at most 100; 1 suits the small model, a large one
        has had less of them.
      seed: of the noise and the order of the clips.
      recipe: instead of steps, minutes, batch, rate and seed: all of it.
      sheet: prompts whose videos are drawn at every checkpoint; None for no picture.
      plan: of the pool of encoded clips; left out, it holds all clips, or 64 a device of a stream.
      data: stands for a stream in run.json; what goes on has to name the same.
      checkpoint_every: minutes between checkpoints.
      revision: of a hub id: a branch, a tag or a commit.
      say: told how it goes, a line at a time.

    Returns:
      Where the model is, and how it went.

    Raises:
      Refusal: clips without a caption each, of a size that the model can't do, or not in [0, 1]; a
        folder with another run; a model that is none, or whose training the device can't hold; a
        number out of range. None of these costs a download of weights or a compilation, but for a
        folder whose run started from other weights. Also: the loss is no number; the disk is full.

    Source: as of `step` and `recipe`.
    """
    folder = Path(os.path.expanduser(files.as_path(folder)))
    _check_numbers(steps, minutes, sitting, checkpoint_every)
    source, clip, about = _stream(clips, captions, data)
    settled = saved_steps(folder, "transformer") if steps is None else steps
    found = check_model(model, clip, revision=revision)
    check_memory(found)
    if recipe is None:
        recipe = gentle(found.shift, steps=settled, batch=batch, rate=rate, seed=seed)
    else:
        _refuse_beside(steps=steps, minutes=minutes, batch=batch, rate=rate, seed=seed)
    plan = plan_for(None if callable(clips) else len(clips)) if plan is None else plan
    asked = {"pool": dataclasses.asdict(plan), "recipe": dataclasses.asdict(recipe)}
    check_some(folder, {"data": about, **asked})
    files.check_folder(folder)
    with owned(folder):
        trainee = TransformerTraining(
            os.fspath(model),
            source,
            recipe,
            plan=plan,
            sheet=Sheet() if sheet is None else sheet,
            data=about,
            revision=revision,
        )
        if minutes is not None and settled is None:
            set_minutes(trainee, minutes, say)
        outcome = run(trainee, folder, sitting=sitting, checkpoint_every=checkpoint_every, say=say)
    return FineTuned(
        model=folder / "model",
        folder=folder,
        losses=read_losses(folder, outcome.step),
        steps=outcome.steps,
        recipe=trainee.recipe,
        start=os.fspath(model),
        revision=revision,
    )


def _check_numbers(
    steps: int | None, minutes: float | None, sitting: float | None, checkpoint_every: float
) -> None:
    if steps is not None and minutes is not None:
        raise Refusal("expected steps or minutes; got both: leave one out")
    if steps is not None:
        checks.whole("steps", steps, 1, MOST_STEPS)
    for name, value in (("minutes", minutes), ("sitting", sitting)):
        if value is not None:
            check_minutes(value, name)
    check_minutes(checkpoint_every, "checkpoint_every")


def _refuse_beside(**given: Any) -> None:
    """Refuses what a recipe says too."""
    names = [name for name, value in given.items() if value is not None]
    if names:
        raise Refusal(
            f"a recipe says all of {', '.join(names)} by itself: leave one or the other out"
        )


def _stream(
    clips: Any, captions: Sequence[str] | None, data: Mapping[str, Any] | None
) -> tuple[Source, tuple[int, ...], Mapping[str, Any]]:
    """The clips as a stream, the shape of one, and what stands for them in run.json."""
    if callable(clips):
        if captions is not None:
            raise Refusal("a stream of clips has its own captions: leave captions out")
        source: Any = clips
        return source, own.first_of(source).shape[1:], dict(data or {})
    if isinstance(captions, np.ndarray):
        captions = captions.tolist()
    source = own.finite(clips, () if captions is None else captions)
    return source, np.shape(clips)[1:], {**own.about(clips, captions or ()), **(data or {})}
