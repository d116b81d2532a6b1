"""`astraea train-tiny` and `astraea score-tiny`: the small model made better, and measured."""

import functools
import pathlib
import time
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from tyro.conf import arg

from astraea_jax import report, timing
from astraea_ports import checkpoints, tiny, training_folder, training_run, wan
from astraea_ports.tiny import lessons, reader_training, scene_captions, scenes, score
from astraea_ports.wan import transformer_training, vae_training
from astraea_ports.wan.parts import SHIPPED
from astraea_ports.wan.training_recipe import Recipe
from astraea_ports.wan.vae_weights import load_vae

Part = Literal["transformer", "vae", "reader"]


def train_tiny(
    *,
    from_: Annotated[str, arg(name="from")] = "tiny",
    minutes: float = 25.0,
    sitting: float | None = None,
    part: Part = "transformer",
    output: pathlib.Path = pathlib.Path("run"),
    steps: int | None = None,
    batch: int | None = None,
    rate: float = 1.0,
    two: float = 0.6,
    text_rate: float = 1.0,
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
        ships, DIR/model of another run goes too), or "nothing" for random ones.
      minutes: How long the whole run takes, on the machine that starts it.
      sitting: Minutes after which to stop with a checkpoint; the same command then goes on.
      part: What to train; the reader is what score-tiny reads videos with.
      output: Folder of the run: checkpoints, loss.png, sheet.png, and the result as model/.
      steps: Length of the run, instead of minutes.
      batch: Clips a step; 128 for each GPU, or 4 without one.
      rate: Factor on all step sizes.
      two: Share of clips with two objects.
      text_rate: Factor on the text encoder's step size.
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
    if sitting is not None:
        training_run.check_minutes(sitting, "sitting")
    training_run.check_minutes(checkpoint_every, "checkpoint_every")
    if not 0 <= sheet <= len(tiny.captions()):
        raise ValueError(f"sheet must be in 0..{len(tiny.captions())}; got {sheet}")
    if not 0 < rate <= 100:
        raise ValueError(f"rate must be above 0 and at most 100; got {rate}")
    large = jax.default_backend() != "cpu"
    say = functools.partial(print, flush=True)

    def make(steps: int) -> training_run.Trainee:
        if part == "reader":
            return _reader(from_, steps, batch or (128 if large else 16), rate, large, seed)
        start = "tiny" if from_ == "nothing" else from_
        dtype = "bfloat16" if large else "float32"
        nothing = from_ == "nothing"
        if part == "vae":
            recipe = vae_training.VAERecipe(
                steps=steps,
                clips=batch or (16 if large else 2),
                muon_rate=0.015 * rate,
                adam_rate=2e-3 * rate,
                seed=seed,
                dtype=dtype,
            )
            return vae_training.VAETraining(
                start, draw_clips, recipe, from_nothing=nothing, data={"two": 0.5}
            )
        source = lessons.Lessons(seed=seed, two=two)
        recipe = Recipe(
            steps=steps,
            batch=batch or (128 * jax.device_count() if large else 4),
            muon_rate=6e-3 * rate,
            adam_rate=1.5e-3 * rate,
            text_rate=text_rate,
            time_even=even_times,
            span=span,
            seed=seed,
            dtype=dtype,
        )
        plan = transformer_training.PoolPlan(
            size=pool or (32768 if large else 64),
            block=32 * jax.device_count() if large else 4,
            refresh_every=refresh_every,
        )
        return transformer_training.TransformerTraining(
            start,
            source,
            recipe,
            plan=plan,
            sheet=transformer_training.Sheet(tiny.captions()[:sheet]),
            from_nothing=nothing,
            data=source.settings,
        )

    with training_folder.owned(output):
        settled = steps or _steps_before(output)
        trainee = make(settled or 1)
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


def draw_clips(key: jax.Array, count: int) -> vae_training.Drawn:
    """Clips for the VAE, half of them with two objects."""
    clips = scenes.make_clips(jax.random.split(key, count), two=0.5)
    return vae_training.Drawn(clips.video, clips.cover)


def _reader(model: str, steps: int, batch: int, rate: float, large: bool, seed: int):
    folder = checkpoints.model_folder(SHIPPED.get(model, model))
    vae = load_vae(folder / "vae", dtype=jnp.bfloat16 if large else jnp.float32)
    recipe = reader_training.ReaderRecipe(
        steps=steps,
        batch=batch,
        muon_rate=0.02 * rate,
        adam_rate=2e-3 * rate,
        # On a CPU the VAE would take nearly all of the time.
        vae_every=6 if large else 0,
        seed=seed,
    )
    return reader_training.ReaderTraining(vae, recipe)


def _steps_before(folder: pathlib.Path) -> int | None:
    """The length of the run that is in the folder: it was settled when that began."""
    settings = training_folder.saved_settings(folder)
    return None if settings is None else int(settings["recipe"]["steps"])


def score_tiny(
    *,
    model: str = "tiny",
    count: int = scene_captions.HELD_OUT,
    batch: int = 16,
    steps: int | None = None,
    guidance: float | None = None,
    reader: pathlib.Path | None = None,
    output: pathlib.Path | None = None,
) -> None:
    """Scores videos of captions that training never saw against what the captions ask for.

    Args:
      model: "tiny", or a folder of a model like it.
      count: How many captions with one object, and as many with two, 1..256; seeds 0, 1, ...
      batch: Videos at once.
      steps: Solver steps; the model's default when left out.
      guidance: Scale of guidance; the model's default when left out.
      reader: Weights of another reader than the one that ships.
      output: A .json file for every number.
    """
    if not 1 <= count <= scene_captions.HELD_OUT:
        raise ValueError(f"count must be in 1..{scene_captions.HELD_OUT}; got {count}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1; got {batch}")
    if output is not None:
        report.files.check_output(output, (".json",))
    gpu = jax.default_backend() != "cpu"
    network = score.reader() if reader is None else score.load_reader(reader)
    pipeline = wan.Pipeline.from_pretrained(model, dtype=jnp.bfloat16 if gpu else jnp.float32)
    rows = []
    with report.Progress() as progress:
        for two in (False, True):
            captions, shown = scene_captions.held_out(two)
            name = "two objects" if two else "one object"
            with progress.stage(name, count) as bar:
                parts = []
                for first in range(0, count, batch):
                    chosen = slice(first, min(first + batch, count))
                    truth = jax.tree.map(lambda x, c=chosen: x[c], shown)
                    noise = _noise(pipeline, chosen)
                    made = pipeline(
                        captions[chosen], latents=noise, steps=steps, guidance=guidance
                    ).video
                    drawn = _drawn(two, chosen)
                    passed = _through_vae(pipeline.vae, drawn)
                    parts.append(
                        [
                            score.compare(score.read(video, network), truth)
                            for video in (made, drawn, passed)
                        ]
                    )
                    for _ in range(first, chosen.stop):
                        bar.advance()
            totals = [score.add(column) for column in zip(*parts, strict=True)]
            rows += [_score_row(name, attribute, totals) for attribute in totals[0]]
    print(report.markdown(rows, SCORE_COLUMNS))
    if output is not None:
        report.write_json(
            output,
            {"environment": report.environment(), "model": model, "count": count, "rows": rows},
        )


SCORE_COLUMNS = {
    "objects": "captions with",
    "attribute": "attribute",
    "total": "asked for",
    "made": "made, %",
    "drawn": "the reader on truth, %",
    "passed": "on truth through the VAE, %",
}


def _score_row(objects: str, attribute: str, totals) -> dict:
    made, drawn, passed = (total[attribute] for total in totals)
    return {
        "objects": objects,
        "attribute": attribute,
        "total": made.total,
        **{
            name: round(share.percent, 1)
            for name, share in (("made", made), ("drawn", drawn), ("passed", passed))
        },
    }


def _noise(pipeline: wan.Pipeline, chosen: slice) -> jax.Array:
    """Caption i starts from the noise that seed i gives it alone."""
    shape = pipeline.latents_shape(*pipeline.size(None, None, None))
    keys = [
        jax.random.fold_in(jax.random.key(seed), 0) for seed in range(chosen.start, chosen.stop)
    ]
    return jnp.stack([jax.random.normal(key, shape, jnp.float32) for key in keys])


def _drawn(two: bool, chosen: slice) -> jax.Array:
    first = scene_captions.HELD_OUT * two + chosen.start
    keys = scenes.clip_keys(scene_captions.HELD_OUT_SEED, first, chosen.stop - chosen.start)
    return scenes.make_clips(keys, two=float(two)).video


@timing.timed_jit()
def _through_vae(vae: wan.VAE, video: jax.Array) -> jax.Array:
    return reader_training.through_vae(vae, video)
