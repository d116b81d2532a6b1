"""How much of what captions ask for a model's videos show: made, read, held against the truth."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from astraea_jax import checks, timing
from astraea_jax.schedule import check_steps
from astraea_ports.pipeline import Pipeline
from astraea_ports.pipeline.tiles import VAE
from astraea_ports.tiny import reader_training, scene_captions, scenes, score
from astraea_ports.tiny.scene_captions import Asked

CAPTIONS: Mapping[str, Callable[[bool], Asked]] = {
    "held-out": scene_captions.held_out,
    "choice": scene_captions.for_choosing,
}
"""Sets of captions that training never saw, of clips with one object or with two."""


class Scored(NamedTuple):
    """What some captions' videos came to.

    Attributes:
      made: what is right of the videos, for each attribute.
      drawn: of the truth as rendered: how well the reader reads.
      passed: of that through the VAE.
      mistakes: of the videos.
    """

    made: Mapping[str, score.Share]
    drawn: Mapping[str, score.Share]
    passed: Mapping[str, score.Share]
    mistakes: Sequence[Mapping[str, Any]]


class Scoring:
    """A model and a reader of its videos, with what is asked of them."""

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        captions: str = "held-out",
        count: int = scene_captions.HELD_OUT,
        steps: int | None = None,
        guidance: float | None = None,
        reader: Path | None = None,
    ):
        """Checks it all, then opens the model: in bfloat16, or in float32 on a CPU.

        Args:
          model: "tiny", or a folder or hub id of a model like it.
          revision: of a hub id: a branch, a tag or a commit.
          captions: which of `CAPTIONS`.
          count: of them with one object, and as many with two.
          steps: of the solver; None is the model's default.
          guidance: None is the model's default.
          reader: weights of another reader than the one that ships.

        Raises:
          Refusal: any of these out of range, no such model, or one of another size of video.
        """
        checks.one_of("captions", captions, tuple(CAPTIONS))
        most = scene_captions.HELD_OUT if captions == "held-out" else scene_captions.CHOICE
        self._count = checks.whole("count", count, 1, most)
        if steps is not None:
            check_steps(steps)
        if guidance is not None:
            checks.number("guidance", guidance, -1000, 1000)
        self._captions, self._steps, self._guidance = CAPTIONS[captions], steps, guidance
        self._reader = score.reader() if reader is None else score.load_reader(reader)
        gpu = jax.default_backend() != "cpu"
        self._pipeline = Pipeline.from_pretrained(
            model, revision=revision, dtype=jnp.bfloat16 if gpu else jnp.float32
        )
        # Of another size no video can be read, which would be said after the first are made.
        score.check_size(self._pipeline.size(None, None, None))

    def batches(self, two: bool, batch: int) -> Iterator[tuple[slice, Scored]]:
        """Scores the captions of clips with one object or with two, `batch` after `batch`.

        Args:
          two: objects instead of one.
          batch: videos at once.

        Yields:
          Which captions, and what is right of their videos.
        """
        asked = self._captions(two)
        for first in range(0, self._count, batch):
            chosen = slice(first, min(first + batch, self._count))
            yield chosen, self._score(asked, chosen)

    def _score(self, asked: Asked, chosen: slice) -> Scored:
        truth, keys = jax.tree.map(lambda leaf: leaf[chosen], (asked.scenes, asked.keys))
        captions, noise = asked.captions[chosen], self._noise(chosen)
        video = self._pipeline(
            captions, latents=noise, steps=self._steps, guidance=self._guidance
        ).video
        rendered = scenes.render_clips(keys, truth, jnp.array(scenes.COLOUR_RGB))[0]
        decoded = _through_vae(self._pipeline.vae, rendered)
        readings = [score.read(each, self._reader) for each in (video, rendered, decoded)]
        mistakes = [
            {"seed": chosen.start + each.video, "caption": captions[each.video], **each._asdict()}
            for each in score.mistakes(readings[0], truth)
        ]
        made, drawn, passed = (score.compare(reading, truth) for reading in readings)
        return Scored(made, drawn, passed, mistakes)

    def _noise(self, chosen: slice) -> jax.Array:
        """Caption i starts from the noise that seed i gives it alone."""
        shape = self._pipeline.latents_shape(*self._pipeline.size(None, None, None))
        keys = [
            jax.random.fold_in(jax.random.key(seed), 0) for seed in range(chosen.start, chosen.stop)
        ]
        return jnp.stack([jax.random.normal(key, shape, jnp.float32) for key in keys])


@timing.timed_jit()
def _through_vae(vae: VAE, video: jax.Array) -> jax.Array:
    return reader_training.through_vae(vae, video)
