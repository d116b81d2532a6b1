"""The scenes as an endless stream of clips with captions, for training."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from astraea_jax.checks import ListOf, Number, Text, Whole
from astraea_ports.tiny import scenes
from astraea_ports.tiny.scene_captions import HELD_OUT_SEED, held_out_captions, make_captions
from astraea_ports.training.clips import Examples
from astraea_ports.training.recipe import SHARE, check_fields


@dataclasses.dataclass(frozen=True)
class Lessons:
    """A `training.clips.Source` of scenes; clip `i` is a function of the seed and `i` alone.

    Attributes:
      seed: of the scenes; never HELD_OUT_SEED.
      two: share of the clips with two objects, 0..1.
      spin: share of the objects that are made to spin, 0..1, beside those that do so anyway: a spin
        is what is hardest to draw, since one latent holds four frames of it.
      colours: red, green and blue of objects, in the order of scenes.COLOURS.
      rename: words to write in the captions instead of others: to teach a new one.
      frames: of a clip.
      side: pixels of height and width.
    """

    seed: int = 0
    two: float = scenes.TWO
    spin: float = 0.0
    colours: tuple[tuple[float, float, float], ...] = scenes.COLOUR_RGB
    rename: tuple[tuple[str, str], ...] = ()
    frames: int = scenes.FRAMES
    side: int = scenes.SIDE

    def __post_init__(self):
        """Refuses what is out of range."""
        number = len(scenes.COLOURS)
        check_fields(
            self,
            {
                "seed": Whole(0, HELD_OUT_SEED - 1),
                "two": SHARE,
                "spin": SHARE,
                "colours": ListOf(ListOf(Number(0, 1), 3, 3), number, number),
                "rename": ListOf(ListOf(Text(), 2, 2), 0, 1000),
                "frames": Whole(1, 1025),
                "side": Whole(8, 2048),
            },
        )

    @property
    def settings(self) -> Mapping[str, Any]:
        """All fields, for run.json."""
        return dataclasses.asdict(self)

    def __call__(self, first: int, count: int) -> Examples:
        """Clips number first..first+count-1. What they show and the words are the host's work."""
        with jax.default_device(jax.devices("cpu")[0]):
            keys = scenes.clip_keys(self.seed, first, count)
            shown = scenes.make_scenes(keys, two=self.two, spin=self.spin)
            captions = make_captions(keys, shown, avoid=held_out_captions())
        swap = dict(self.rename)
        captions = [" ".join(swap.get(word, word) for word in text.split()) for text in captions]
        # The key's words are sent, not the key, so that the drawing's device is free.
        words, scene = jax.device_get((jax.random.key_data(keys), shown))

        def video():
            return scenes.render_clips(
                jax.random.wrap_key_data(jnp.asarray(words)),
                jax.tree.map(jnp.asarray, scene),
                jnp.asarray(self.colours),
                frames=self.frames,
                side=self.side,
            )[0]

        return Examples(video, captions)
