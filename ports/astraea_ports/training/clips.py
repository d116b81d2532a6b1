"""Clips and their captions: an endless stream of them, or one's own few."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from astraea_jax import checks
from astraea_jax.checks import Refusal


class Examples(NamedTuple):
    """Clips and what they show.

    Attributes:
      video: makes the clips, in [0, 1]; called once, on the training device.
      captions: one a clip.
    """

    video: Callable[[], Float[Array, "B F height width 3"]]
    captions: Sequence[str]


Source = Callable[[int, int], Examples]
"""`source(first, count)`: clips number first..first+count-1 of an endless stream, a pure function.

A finite set of clips is such a stream too: it starts again."""


def finite(
    videos: Float[np.ndarray | Array, "P F height width 3"], captions: Sequence[str]
) -> Source:
    """A stream that goes through given clips again and again: for fine-tuning on one's own.

    Args:
      videos: in [0, 1].
      captions: one a clip.

    Raises:
      Refusal: as `check_clips`.
    """
    check_clips(videos, captions)

    def source(first: int, count: int) -> Examples:
        chosen = np.arange(first, first + count) % len(videos)
        return Examples(lambda: jnp.asarray(videos[chosen]), [captions[int(i)] for i in chosen])

    return source


def check_clips(videos: Any, captions: Any) -> None:
    """Refuses what are no clips with a caption each.

    Raises:
      Refusal: no array [P, F, height, width, 3] of floats in [0, 1], no clip, another number of
        captions, or one that is no text.
    """
    videos = checks.array("clips", videos, "[P,F,height,width,3] in [0, 1]")
    if videos.ndim != 5 or videos.shape[-1] != 3 or not jnp.issubdtype(videos.dtype, np.floating):
        raise Refusal(
            "clips must be floats [P,F,height,width,3] in [0, 1]; got "
            f"{videos.dtype} {list(videos.shape)}"
            + (": divide by 255" if videos.dtype == np.uint8 else "")
        )
    problem = checks.ListOf(checks.Text(100_000, empty=True), 0, 2**31).problem(captions)
    if problem is not None:
        raise Refusal(f"captions {problem}: give a caption for each clip")
    if not len(videos) or len(videos) != len(captions):
        raise Refusal(
            f"expected a caption for each clip, and at least one; got {len(videos)} clips and "
            f"{len(captions)} captions"
        )
    low, high = float(videos.min()), float(videos.max())
    if not (low >= 0 and high <= 1):
        raise Refusal(
            f"clips must be in [0, 1]; got {low:g} to {high:g}: scale them, as 255 to 1 and 0 to 0"
        )


def first_of(source: Source) -> Float[Array, "1 F height width 3"]:
    """The first clip of a stream, drawn to see what it is like.

    Raises:
      Refusal: it gives no clips with a caption each.
    """
    made = source(0, 1)
    if not isinstance(made, Examples):
        raise Refusal(
            "expected source(first, count) to give an Examples (a function that makes the clips, "
            f"and their captions); got {checks.shown(made)}"
        )
    video = made.video()
    check_clips(video, made.captions)
    return jnp.asarray(video)


def about(
    videos: Float[np.ndarray | Array, "P F height width 3"], captions: Sequence[str]
) -> Mapping:
    """What stands for clips in a run's settings: other clips or captions have another."""
    digest = hashlib.sha256()
    for clip, caption in zip(videos, captions, strict=True):
        digest.update(np.ascontiguousarray(clip, np.float32))
        digest.update(caption.encode(errors="surrogatepass") + b"\0")
    return {"clips": list(np.shape(videos)), "sha256": digest.hexdigest()[:16]}
