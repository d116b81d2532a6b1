"""`astraea train-tiny`: the small model made better."""

import contextlib
import dataclasses
import functools
import inspect
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, get_args

import jax
import jax.numpy as jnp
from tyro.conf import arg

from astraea_jax import checks, files
from astraea_jax.checks import Refusal
from astraea_ports import checkpoints, tiny
from astraea_ports.tiny import lessons, reader_training, scenes
from astraea_ports.training import folder as training_folder
from astraea_ports.training import run as training_run
from astraea_ports.training.pool import MOST_POOLED
from astraea_ports.training.recipe import MOST_CLIPS, MOST_STEPS, Recipe
from astraea_ports.wan.training import transformer as transformer_training
from astraea_ports.wan.training import vae as vae_training
from astraea_ports.wan.vae_weights import load_vae

Part = Literal["transformer", "vae", "reader"]

TWO = 0.5
"""Share of the VAE's clips with two objects."""

_OF_THE_TRANSFORMER = (
    *("two", "spin", "text_rate", "wrong_text", "even_times", "span"),
    *("pool", "refresh_every", "sheet"),
)
"""Options that the other parts make no use of."""

MOST_ON_CPU = 4096
"""Clips of a batch or a pool without a GPU: an hour to draw and encode, or a step to take."""


def train_tiny(
    *,
    from_: Annotated[str, arg(name="from")] = "tiny",
    revision: str | None = None,
    minutes: float = 25.0,
    sitting: float | None = None,
    part: Part = "transformer",
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
    began = time.monotonic()
    training_run.check_minutes(minutes)
    if steps is not None:
        checks.whole("steps", steps, 1, MOST_STEPS)
    if sitting is not None:
        training_run.check_minutes(sitting, "sitting")
    training_run.check_minutes(checkpoint_every, "checkpoint_every")
    order = Order(
        part=part,
        model=from_,
        revision=revision,
        batch=batch,
        rate=rate,
        two=two,
        spin=spin,
        text_rate=text_rate,
        wrong_text=wrong_text,
        even_times=even_times,
        span=span,
        pool=pool,
        refresh_every=refresh_every,
        seed=seed,
        sheet=sheet,
    )
    say = functools.partial(print, flush=True)
    found = training_folder.saved_steps(output, part)
    settled = found if steps is None else steps
    make = order.maker(settled or 1)  # all options are checked by now, and nothing is written
    files.check_folder(output)
    with training_folder.owned(output), _memory_said():
        trainee = make()
        if settled is None:
            training_run.set_minutes(trainee, minutes, say)
        if sitting is not None:  # it counts from the command's start
            sitting = max(1e-9, sitting - (time.monotonic() - began) / 60)
        outcome = training_run.run(
            trainee, output, sitting=sitting, checkpoint_every=checkpoint_every, say=say
        )
    done = outcome.step >= outcome.steps
    say(
        f"step {outcome.step} of {outcome.steps}, loss {outcome.loss:.4f}, "
        f"{outcome.rate:.1f} samples/s; "
        + (f"the model is in {output}/model" if done else "the same command goes on")
    )


@contextlib.contextmanager
def _memory_said() -> Iterator[None]:
    """What a device has no memory for is the batch's fault, and the user's to mend."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise Refusal(
            f"the device has no memory for it ({files.reason(error)}): ask for a smaller --batch, "
            "--pool or --sheet"
        ) from error


@dataclasses.dataclass(frozen=True)
class Order:
    """What to train, as `train_tiny` was asked for it; None is what suits the device."""

    part: Part
    model: str
    revision: str | None
    batch: int | None
    rate: float
    two: float
    spin: float
    text_rate: float
    wrong_text: float
    even_times: float
    span: tuple[float, float]
    pool: int | None
    refresh_every: int
    seed: int
    sheet: int

    def __post_init__(self):
        """Refuses what is out of range, but for what the recipes refuse."""
        checks.one_of("part", self.part, get_args(Part))
        if self.part != "transformer":
            self._refuse_unused()
        checks.whole("sheet", self.sheet, 0, len(tiny.captions()))
        checks.number("rate", self.rate, 0, 100, above=True)
        large = jax.default_backend() != "cpu"
        where = "" if large else "without a GPU"
        for name, most in (("batch", MOST_CLIPS), ("pool", MOST_POOLED)):
            if getattr(self, name) is not None:
                checks.whole(
                    name, getattr(self, name), 1, most if large else MOST_ON_CPU, unit=where
                )
        if self.model == "nothing" and self.part == "reader":
            raise Refusal("the reader starts from nothing; --from says whose VAE it sees clips by")

    def _refuse_unused(self) -> None:
        """Refuses what was asked for and would change nothing; checked by nothing else either."""
        defaults = inspect.signature(train_tiny).parameters
        given = [
            f"--{name.replace('_', '-')}"
            for name in _OF_THE_TRANSFORMER
            if getattr(self, name) != defaults[name].default
        ]
        if given:
            raise Refusal(
                f"{', '.join(given)}: of --part transformer alone, and --part {self.part} makes no "
                "use of it; leave it out"
            )

    def maker(self, steps: int) -> Callable[[], training_run.Trainee]:
        """What makes the trainee of a run of so many steps; it alone loads the model.

        Raises:
          Refusal: an option out of range.
        """
        large = jax.default_backend() != "cpu"
        make = {"transformer": self._transformer, "vae": self._vae, "reader": self._reader}
        return make[self.part](steps, large)

    @property
    def _start(self) -> dict[str, Any]:
        """Where the weights come from: a model, or its sizes alone."""
        nothing = self.model == "nothing"
        model = "tiny" if nothing else self.model
        return {"model": model, "revision": self.revision, "from_nothing": nothing}

    def _transformer(self, steps: int, large: bool) -> Callable[[], training_run.Trainee]:
        source = lessons.Lessons(seed=self.seed, two=self.two, spin=self.spin)
        devices = jax.device_count()
        recipe = Recipe(
            steps=steps,
            batch=_or(self.batch, 128 * devices if large else 4),
            muon_rate=6e-3 * self.rate,
            adam_rate=1.5e-3 * self.rate,
            text_rate=self.text_rate,
            wrong_text=self.wrong_text,
            time_even=self.even_times,
            span=self.span,
            seed=self.seed,
            dtype="bfloat16" if large else "float32",
        )
        plan = transformer_training.PoolPlan(
            size=_or(self.pool, 32768 if large else 64),
            block=32 * devices if large else 4,
            refresh_every=self.refresh_every,
        )
        return functools.partial(
            transformer_training.TransformerTraining,
            source=source,
            recipe=recipe,
            plan=plan,
            sheet=transformer_training.Sheet(tiny.captions()[: self.sheet]),
            data=source.settings,
            **self._start,
        )

    def _vae(self, steps: int, large: bool) -> Callable[[], training_run.Trainee]:
        recipe = vae_training.VAERecipe(
            steps=steps,
            clips=_or(self.batch, 16 if large else 2),
            muon_rate=0.015 * self.rate,
            adam_rate=2e-3 * self.rate,
            seed=self.seed,
            dtype="bfloat16" if large else "float32",
        )
        return functools.partial(
            vae_training.VAETraining,
            draw=draw_clips,
            recipe=recipe,
            data={"two": TWO},
            **self._start,
        )

    def _reader(self, steps: int, large: bool) -> Callable[[], training_run.Trainee]:
        recipe = reader_training.ReaderRecipe(
            steps=steps,
            batch=_or(self.batch, 128 if large else 16),
            muon_rate=0.02 * self.rate,
            adam_rate=2e-3 * self.rate,
            # On a CPU the VAE would take nearly all of the time.
            vae_every=6 if large else 0,
            seed=self.seed,
        )

        def make() -> training_run.Trainee:
            folder = checkpoints.model_folder(self.model, revision=self.revision)
            vae = load_vae(folder / "vae", dtype=jnp.bfloat16 if large else jnp.float32)
            return reader_training.ReaderTraining(vae, recipe)

        return make


def _or(given: int | None, otherwise: int) -> int:
    return otherwise if given is None else given


def draw_clips(key: jax.Array, count: int) -> vae_training.Drawn:
    """Clips for the VAE."""
    clips = scenes.make_clips(jax.random.split(key, count), two=TWO)
    return vae_training.Drawn(clips.video, clips.cover)
