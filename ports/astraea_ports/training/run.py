"""A training run in a folder: resumable at any moment, whatever it trains.

    DIR/run.json          what is trained and how; a run of anything else is refused here
    DIR/checkpoints/      Orbax: the last two states, whole
    DIR/losses.npy        the loss of every step up to the last checkpoint
    DIR/loss.png          the same as a picture
    DIR/sheet.png         what it makes now
    DIR/model/            the average weights, a folder in the Diffusers layout

Taken up again, a run continues from its last checkpoint as if it had never stopped: state, order of
the clips and noise are functions of the step. `model/` also is the form to take to another machine:
a third of the size; a run that starts from it has the average for weights and no moments, and warms
up again.
"""

import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from astraea_jax import checks, files, video
from astraea_jax.checks import Refusal
from astraea_ports.training.folder import Checkpoints, check_settings, whole_folder
from astraea_ports.training.losses import draw_losses, read_losses, write_losses

LONGEST_MINUTES = 60 * 24 * 14
_IN_FLIGHT = 4  # steps whose loss is not waited for


@runtime_checkable
class Trainee(Protocol):
    """What a run trains."""

    recipe: Any
    """A frozen dataclass with a field `steps`: of the whole run."""

    batch: int
    """Clips a step."""

    period: int
    """Steps after which they are of the same kinds again."""

    @property
    def steps(self) -> int:
        """The recipe's."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that decides the result; JSON."""
        ...

    def start(self) -> Any:
        """The first state, a pytree."""
        ...

    def prepare(self, step: int, say: Callable[[str], None]) -> None:
        """Brings the data to what a step is to find."""
        ...

    def upkeep(self) -> float:
        """Seconds that renewing the data takes, for each step; once `prepare` has brought them."""
        ...

    def advance(self, state: Any) -> tuple[Any, jax.Array]:
        """One step: the next state (the old one's memory may be taken), and the loss."""
        ...

    def export(self, state: Any, folder: pathlib.Path) -> None:
        """Writes the trained model as a folder in the Diffusers layout."""
        ...

    def sheet(self, state: Any) -> np.ndarray | None:
        """A picture of what it makes now."""
        ...


class Outcome(NamedTuple):
    """How a sitting ended.

    Attributes:
      step: steps done in all.
      steps: of the whole run.
      loss: mean of the last hundred steps.
      rate: clips a second, pictures and checkpoints apart.
    """

    step: int
    steps: int
    loss: float
    rate: float


def check_minutes(minutes: float, name: str = "minutes") -> float:
    """Returns the minutes if a run may take so long.

    Raises:
      Refusal: zero, negative, not a number, or more than two weeks.
    """
    if checks.Number(0, LONGEST_MINUTES, above=True).problem(minutes) is not None:
        raise Refusal(
            f"{name} must be above 0 and at most {LONGEST_MINUTES} (two weeks); got "
            f"{checks.shown(minutes)}"
        )
    return float(minutes)


def set_minutes(
    trainee: Trainee, minutes: float, say: Callable[[str], None], timed: int = 6
) -> None:
    """Makes the run as long as `minutes` allow on this machine, from a few steps thrown away.

    Raises:
      Refusal: minutes out of range, or a run of more steps than its recipe allows.
    """
    check_minutes(minutes)
    timed += -timed % trainee.period
    state, value, began = trainee.start(), None, 0.0
    for index in range(trainee.period + timed):
        trainee.prepare(index % trainee.period, say)
        if index == trainee.period:  # every kind of step is compiled by now
            jax.block_until_ready(value)
            began = time.perf_counter()
        state, value = trainee.advance(state)
    jax.block_until_ready(value)
    # The data are renewed between the steps, and none of these few need meet that.
    rate = 1 / ((time.perf_counter() - began) / timed + trainee.upkeep())
    steps = max(1, round(60 * minutes * rate))
    say(f"{rate:.2f} steps/s: {steps} steps in {minutes:g} min")
    trainee.recipe = dataclasses.replace(trainee.recipe, steps=steps)


def run(
    trainee: Trainee,
    folder: pathlib.Path,
    *,
    sitting: float | None = None,
    checkpoint_every: float = 2.0,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Trains until the run's last step, or until the sitting's time is up.

    Args:
      trainee: what is trained.
      folder: of the run, held by `owned`; a run that is in it is taken up again.
      sitting: minutes from now after which to write a checkpoint and stop; None for never.
      checkpoint_every: minutes between checkpoints.
      say: told how it goes.

    Returns:
      How far it came.

    Raises:
      Refusal: minutes out of range, the folder's run is another one, the loss is no number, or the
        disk is full.
    """
    began = time.monotonic()
    check_minutes(checkpoint_every, "checkpoint_every")
    if sitting is not None:
        check_minutes(sitting, "sitting")
    check_settings(folder, trainee.settings)
    checkpoints = Checkpoints(folder / "checkpoints")
    try:
        state = trainee.start()
        losses = np.zeros(0, np.float32)
        last = checkpoints.latest()
        if last is not None:
            state = checkpoints.restore(state)
            losses = read_losses(folder, last)
            say(f"taken up at step {last} of {trainee.steps}")
        return _Loop(trainee, folder, checkpoints, state, losses, say).go(
            began, sitting, checkpoint_every
        )
    finally:
        checkpoints.close()


class _Loop:
    """The state of a sitting."""

    def __init__(self, trainee, folder, checkpoints, state, losses, say):
        self.trainee, self.folder, self.checkpoints = trainee, folder, checkpoints
        self.state, self.losses, self.say = state, losses.tolist(), say
        self.pending: list[jax.Array] = []
        self.saved = checkpoints.latest()
        # When the first step was done, which compiles, and how many losses there were then.
        self.since: tuple[float, int] | None = None
        self.kept_for = 0.0  # seconds since then that went into checkpoints
        self.written = False  # whether the last checkpoint's model is known to be there

    @property
    def step(self) -> int:
        return len(self.losses) + len(self.pending)

    def go(self, began: float, sitting: float | None, every: float) -> Outcome:
        trainee, ends = self.trainee, None if sitting is None else began + 60 * sitting
        spoke = saved = time.monotonic()
        while self.step < trainee.steps:
            now = time.monotonic()
            if ends is not None and now >= ends:
                break
            if now - saved >= 60 * every and self.step > (self.saved or 0):
                self.keep()
                saved = time.monotonic()
            trainee.prepare(self.step, self.say)
            self.state, value = trainee.advance(self.state)
            self.pending.append(value)
            self.collect(0 if self.since is None else _IN_FLIGHT)
            self.since = self.since or (time.monotonic(), len(self.losses))
            if now - spoke >= 10 and self.rate():
                spoke = now
                self.speak()
        self.collect(0)
        rate = self.rate()
        if self.saved != self.step:
            self.keep()
        elif not self.written:  # stopped after the checkpoint, it may not have come to the model
            self.write()
        return Outcome(self.step, trainee.steps, self.loss(), rate)

    def collect(self, leave: int) -> None:
        """Reads losses that are ready, all but the last few; stops at one that is no number."""
        while len(self.pending) > leave:
            value = float(self.pending.pop(0))
            if not math.isfinite(value):
                kept = self.checkpoints.latest()
                raise Refusal(
                    f"the loss at step {len(self.losses)} is not a number; "
                    + (f"the checkpoint of step {kept} is kept" if kept else "nothing was saved")
                    + ": start another run with a lower rate, from its model/ if it has one"
                )
            self.losses.append(value)

    def loss(self) -> float:
        return float(np.mean(self.losses[-100:])) if self.losses else math.nan

    def rate(self) -> float:
        """Clips a second since the first step, checkpoints apart."""
        if self.since is None or len(self.losses) == self.since[1]:
            return 0.0
        seconds = time.monotonic() - self.since[0] - self.kept_for
        return self.trainee.batch * (len(self.losses) - self.since[1]) / seconds

    def speak(self) -> None:
        left = (self.trainee.steps - self.step) * self.trainee.batch / self.rate() / 60
        self.say(
            f"step {self.step}/{self.trainee.steps}  loss {self.loss():.4f}  "
            f"{self.rate():.1f} samples/s  {left:.1f} min left"
        )

    def keep(self) -> None:
        """A checkpoint, the curve, the model and a sheet of what it makes."""
        self.collect(0)
        began = time.monotonic()
        write_losses(self.folder, self.losses)
        self.checkpoints.save(self.step, self.state)
        self.saved, self.written = self.step, False
        self.write()
        self.kept_for += time.monotonic() - began
        self.say(f"checkpoint of step {self.step}  loss {self.loss():.4f}")

    def write(self) -> None:
        """The model and the pictures of the last checkpoint."""
        try:
            with whole_folder(self.folder / "model") as partial:
                self.trainee.export(self.state, partial)
        except (OSError, Refusal) as error:
            raise Refusal(
                f"the model of step {self.step} could not be written ({files.reason(error)}); its "
                "checkpoint is kept: make room and start the same run again"
            ) from error
        draw_losses(self.folder / "loss.png", np.asarray(self.losses))
        sheet = self.trainee.sheet(self.state)
        if sheet is not None:
            video.write_image(self.folder / "sheet.png", sheet)
        self.written = True
