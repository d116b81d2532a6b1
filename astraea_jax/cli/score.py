"""`astraea score-tiny`: videos of the small model, read back and held against their captions."""

import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp

from astraea_jax import checks, files, report, timing
from astraea_jax.schedule import check_steps
from astraea_ports import wan
from astraea_ports.tiny import reader_training, scene_captions, scenes, score
from astraea_ports.tiny.scene_captions import Asked

CAPTIONS = {"held-out": scene_captions.held_out, "choice": scene_captions.for_choosing}
SHOWN = 12
"""Mistakes that are printed of each set of captions; the file holds all."""

SCORE_COLUMNS = {
    "objects": "captions with",
    "attribute": "attribute",
    "total": "asked for",
    "made": "made, %",
    "drawn": "the reader on truth, %",
    "passed": "on truth through the VAE, %",
}


def score_tiny(
    *,
    model: str = "tiny",
    revision: str | None = None,
    captions: Literal["held-out", "choice"] = "held-out",
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
      revision: Of a hub id: a branch, a tag or a commit.
      captions: "held-out" are those that scores are reported of; "choice" are 768 others, to
        choose between models by.
      count: How many captions with one object, and as many with two; seeds 0, 1, ...
      batch: Videos at once.
      steps: Solver steps; the model's default when left out.
      guidance: Scale of guidance; the model's default when left out.
      reader: Weights of another reader than the one that ships.
      output: A .json file for every number.
    """
    checks.one_of("captions", captions, tuple(CAPTIONS))
    most = scene_captions.HELD_OUT if captions == "held-out" else scene_captions.CHOICE
    checks.whole("count", count, 1, most)
    checks.whole("batch", batch, 1, 1024)
    if steps is not None:
        check_steps(steps)
    if guidance is not None:
        checks.number("guidance", guidance, -1000, 1000)
    network = score.reader() if reader is None else score.load_reader(reader)
    if output is not None:
        files.check_output(output, (".json",))
        files.check_apart(output, reader)
    gpu = jax.default_backend() != "cpu"
    pipeline = wan.Pipeline.from_pretrained(
        model, revision=revision, dtype=jnp.bfloat16 if gpu else jnp.float32
    )
    # Of another size no video can be read, which would be said after the first are made.
    score.check_size(pipeline.size(None, None, None))
    found: dict[str, Any] = {
        "environment": report.environment(),
        "model": model,
        "captions": captions,
        "count": count,
        "steps": steps,
        "guidance": guidance,
        "rows": [],
        "mistakes": [],
    }
    for two in (False, True):
        asked = CAPTIONS[captions](two)
        name = "two objects" if two else "one object"
        batches, mistakes = [], []
        with report.Progress() as progress, progress.stage(name, count) as bar:
            for first in range(0, count, batch):
                chosen = slice(first, min(first + batch, count))
                shares, wrong = _score(pipeline, network, asked, chosen, steps, guidance)
                batches.append(shares)
                mistakes += wrong
                for _ in range(first, chosen.stop):
                    bar.advance()
        totals = [score.add(column) for column in zip(*batches, strict=True)]
        rows = [_score_row(name, attribute, totals) for attribute in totals[0]]
        _show(rows, mistakes, output)
        found["rows"] += rows
        found["mistakes"] += mistakes
        if output is not None:  # also between the two, lest the first be lost
            report.write_json(output, found)


def _score(
    pipeline: wan.Pipeline,
    network: score.Reader,
    asked: Asked,
    chosen: slice,
    steps: int | None,
    guidance: float | None,
) -> tuple[list[dict[str, score.Share]], list[dict[str, Any]]]:
    """What is right of some captions' videos, of their truth, and of that through the VAE."""
    truth, keys = jax.tree.map(lambda leaf: leaf[chosen], (asked.scenes, asked.keys))
    captions, noise = asked.captions[chosen], _noise(pipeline, chosen)
    made = pipeline(captions, latents=noise, steps=steps, guidance=guidance).video
    drawn = scenes.render_clips(keys, truth, jnp.array(scenes.COLOUR_RGB))[0]
    passed = _through_vae(pipeline.vae, drawn)
    readings = [score.read(video, network) for video in (made, drawn, passed)]
    mistakes = [
        {"seed": chosen.start + each.video, "caption": captions[each.video], **each._asdict()}
        for each in score.mistakes(readings[0], truth)
    ]
    return [score.compare(reading, truth) for reading in readings], mistakes


def _show(
    rows: list[dict[str, Any]], mistakes: list[dict[str, Any]], output: pathlib.Path | None
) -> None:
    """Prints a set's table, and what was wrong."""
    print(report.markdown(rows, SCORE_COLUMNS))
    for each in mistakes[:SHOWN]:
        print(f"seed {each['seed']}, {each['caption']!r}: {each['read']}, not {each['asked']}")
    if len(mistakes) > SHOWN:
        print(f"and {len(mistakes) - SHOWN} more" + (f" in {output}" if output else ""))
    print(flush=True)


def _score_row(objects: str, attribute: str, totals) -> dict[str, Any]:
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


@timing.timed_jit()
def _through_vae(vae: wan.VAE, video: jax.Array) -> jax.Array:
    return reader_training.through_vae(vae, video)
