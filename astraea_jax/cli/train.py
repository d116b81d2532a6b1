"""`astraea train-tiny`: the small model made better."""

import contextlib
import functools
import inspect
import pathlib
import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from tyro.conf import arg

from astraea_jax import checks, files
from astraea_jax.checks import Refusal

_OF_THE_TRANSFORMER = (
    *("two", "spin", "text_rate", "wrong_text", "even_times", "span"),
    *("pool", "refresh_every", "sheet"),
)
"""Options that the other parts make no use of."""


def train_tiny(
    *,
    from_: Annotated[str, arg(name="from")] = "tiny",
    revision: str | None = None,
    minutes: float = 25.0,
    sitting: float | None = None,
    part: Literal["transformer", "vae", "reader"] = "transformer",
    output: pathlib.Path = pathlib.Path("run"),
    steps: int | None = None,
    batch: int | None = None,
    rate: float = 1.0,
    two: float = 0.7,
    spin: float = 0.0,
    text_rate: float = 1.0,
    wrong_text: float = 0.25,
    even_times: float = 0.4,
    span: tuple[float, float] = (0.0, 1.0),
    pool: int | None = None,
    refresh_every: int = 8,
    seed: int = 0,
    checkpoint_every: float = 2.0,
    sheet: int = 6,
) -> None:
    """Trains the small Wan, or goes on with the run in the folder.

    Args:
      from_: A folder in the Diffusers layout whose weights to start from ("tiny" is the one that
        ships, DIR/model of another run goes too), a hub id, or "nothing" for random ones.
      revision: Of a hub id: a branch, a tag or a commit.
      minutes: How long the whole run takes, on the machine that starts it.
      sitting: Minutes after which to stop with a checkpoint; the same command then goes on.
      part: What to train; the reader is what score-tiny reads videos with.
      output: Folder of the run: checkpoints, loss.png, sheet.png, and the result as model/.
      steps: Length of the run, instead of minutes.
      batch: Clips a step; 128 for each GPU, or 4 without one.
      rate: Factor on all step sizes.
      two: Share of clips with two objects.
      spin: Share of objects that are made to spin, beside those that do so anyway.
      text_rate: Factor on the text encoder's step size.
      wrong_text: Share of clips that get another clip's caption, so that guidance of 5, which the
        small Wan is made for, does not overshoot.
      even_times: Share of noise levels drawn as the solver visits them.
      span: Part of the rates' schedule that this run goes through: 0 0.5, then 0.5 1 elsewhere.
      pool: Clips that lie encoded on the device; 32768, or 64 without a GPU.
      refresh_every: Steps from one replaced block of the pool to the next; 0 for never.
      seed: Of the clips, their order and the noise.
      checkpoint_every: Minutes between checkpoints.
      sheet: Videos in sheet.png; 0 for none.
    """
    _train(**locals())  # all options, by name


def _train(
    *,
    from_: str,
    minutes: float,
    sitting: float | None,
    output: pathlib.Path,
    steps: int | None,
    checkpoint_every: float,
    **order: Any,
) -> None:
    """Does what `train_tiny` says; `order` is of `tiny.training.Order`."""
    began = time.monotonic()
    from astraea_ports.tiny.training import Order
    from astraea_ports.training.folder import owned, saved_steps
    from astraea_ports.training.recipe import MOST_STEPS
    from astraea_ports.training.run import check_minutes, run, set_minutes

    check_minutes(minutes)
    if steps is not None:
        checks.whole("steps", steps, 1, MOST_STEPS)
    if sitting is not None:
        check_minutes(sitting, "sitting")
    check_minutes(checkpoint_every, "checkpoint_every")
    _refuse_unused(from_, order)
    asked = Order(model=from_, **order)
    found = saved_steps(output, asked.part)
    settled = found if steps is None else steps
    make = asked.maker(settled or 1)  # all options are checked by now, and nothing is written
    files.check_folder(output)
    say = functools.partial(print, flush=True)
    with owned(output), _memory_said():
        trainee = make()
        if settled is None:
            set_minutes(trainee, minutes, say)
        if sitting is not None:  # it counts from the command's start
            sitting = max(1e-9, sitting - (time.monotonic() - began) / 60)
        outcome = run(trainee, output, sitting=sitting, checkpoint_every=checkpoint_every, say=say)
    done = outcome.step >= outcome.steps
    say(
        f"step {outcome.step} of {outcome.steps}, loss {outcome.loss:.4f}, "
        f"{outcome.rate:.1f} samples/s; "
        + (f"the model is in {output}/model" if done else "the same command goes on")
    )


def _refuse_unused(from_: str, order: dict[str, Any]) -> None:
    """Refuses what was asked for and would change nothing; checked by nothing else either."""
    part = order["part"]
    if part == "transformer":
        return
    defaults = inspect.signature(train_tiny).parameters
    given = [
        f"--{name.replace('_', '-')}"
        for name in _OF_THE_TRANSFORMER
        if order[name] != defaults[name].default
    ]
    if given:
        raise Refusal(
            f"{', '.join(given)}: of --part transformer alone, and --part {part} makes no use of "
            "it; leave it out"
        )
    if from_ == "nothing" and part == "reader":
        raise Refusal("the reader starts from nothing; --from says whose VAE it sees clips by")


@contextlib.contextmanager
def _memory_said() -> Iterator[None]:
    """What a device has no memory for is the batch's fault, and the user's to mend."""
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise Refusal(
            f"the device has no memory for it ({files.reason(error)}): ask for a smaller --batch, "
            "--pool or --sheet"
        ) from error
