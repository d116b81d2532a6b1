"""`astraea score-tiny`: videos of the small model, read back and held against their captions."""

import pathlib

import jax
import jax.numpy as jnp

from astraea_jax import report, timing
from astraea_ports import wan
from astraea_ports.tiny import reader_training, scene_captions, scenes, score


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
    rows, wrong = [], []
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
                    readings = [score.read(video, network) for video in (made, drawn, passed)]
                    parts.append([score.compare(reading, truth) for reading in readings])
                    for each in score.mistakes(readings[0], truth):
                        seed = first + each.video
                        wrong.append({"seed": seed, "caption": captions[seed], **each._asdict()})
                    for _ in range(first, chosen.stop):
                        bar.advance()
            totals = [score.add(column) for column in zip(*parts, strict=True)]
            rows += [_score_row(name, attribute, totals) for attribute in totals[0]]
    print(report.markdown(rows, SCORE_COLUMNS))
    for each in wrong[:SHOWN]:
        print(f"seed {each['seed']}, {each['caption']!r}: {each['read']}, not {each['asked']}")
    if len(wrong) > SHOWN:
        print(f"and {len(wrong) - SHOWN} more" + (f" in {output}" if output else ""))
    if output is not None:
        report.write_json(
            output,
            {
                "environment": report.environment(),
                "model": model,
                "count": count,
                "rows": rows,
                "mistakes": wrong,
            },
        )


SHOWN = 12
"""Mistakes that are printed; the file holds all."""

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
