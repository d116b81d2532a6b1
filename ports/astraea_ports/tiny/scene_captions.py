"""The words for what a clip shows, and the captions that training is kept from.

Pure functions of the clips' keys, as the clips themselves; words are the host's work.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from astraea_ports.tiny.scenes import COLOURS, GROUNDS, TEXTURES, Scene, clip_keys, make_scenes

SHAPE_WORDS = (
    *(("circle", "disc", "ball"), ("square", "box"), ("triangle",), ("star",)),
    *(("ring", "hoop", "donut"), ("cross", "plus sign")),
)
MOTION_WORDS = (
    ("moving left", "moving to the left", "sliding left", "drifting to the left"),
    ("moving right", "moving to the right", "sliding right", "drifting to the right"),
    ("moving up", "rising", "moving upwards", "going up"),
    ("moving down", "falling", "moving downwards", "going down"),
    ("spinning", "rotating", "turning around"),
    ("growing", "getting bigger", "expanding"),
    ("shrinking", "getting smaller"),
    ("bouncing", "jumping up and down"),
)
SIZE_WORDS = (("small", "tiny"), (), ("big", "large"))
PLACES = ("over", "on", "in front of", "against")
OPENINGS = ("", "", "", "a video of ", "an animation of ", "a short clip of ")
WALLS = ("background", "background", "wall", "backdrop")
FILLERS = (
    *("shiny", "nice", "little", "lovely", "bright", "single", "simple", "cute", "pretty", "cool"),
    *("funny", "glossy", "solid", "cartoon", "toy", "paper", "plastic", "clean", "clear", "happy"),
    *("strange", "smooth", "fancy"),
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
_WORD_DRAWS = 48


def make_captions(
    keys: Key[Array, "B"], scenes: Scene, *, avoid: frozenset[str] = frozenset()
) -> list[str]:
    """A caption for each clip: synonyms, fillers, and in 3 % of objects an invented word.

    Args:
      keys: of the clips.
      scenes: what the clips show.
      avoid: captions that must not come; such a clip gets another of its own.
    """
    rows = [np.asarray(leaf) for leaf in scenes]
    labels = [Scene(*(row[index] for row in rows)) for index in range(len(rows[0]))]
    captions = [""] * len(labels)
    waiting = list(range(len(labels)))
    attempt = 2
    while waiting:
        draws = _word_draws(keys, attempt)
        for index in waiting:
            captions[index] = _caption(labels[index], _Draws(draws[index].tolist()))
        waiting = [index for index in waiting if captions[index] in avoid]
        attempt += 1
    return captions


def _word_draws(keys: Key[Array, "B"], salt: int) -> np.ndarray:
    def draw(key):
        return jax.random.uniform(jax.random.fold_in(key, salt), (_WORD_DRAWS,), jnp.float32)

    return np.asarray(jax.vmap(draw)(keys))


class _Draws:
    """Draws in [0, 1), each used for one choice."""

    def __init__(self, values: Iterable[float]):
        self._values = iter(values)

    def whole(self, count: int) -> int:
        """One of 0..count-1."""
        return int(next(self._values) * count)

    def choose(self, options: Sequence[str]) -> str:
        """One of the options."""
        return options[self.whole(len(options))]

    def chance(self, share: float) -> bool:
        """True for so large a share of the draws."""
        return next(self._values) < share


def _caption(scene: Scene, draws: _Draws) -> str:
    """Words for one scene."""
    objects = " and ".join([_object(scene, index, draws) for index in range(scene.count)])
    plain = scene.texture == 0 and draws.chance(0.7)
    wall = GROUNDS[scene.ground] if plain else f"{TEXTURES[scene.texture]} {GROUNDS[scene.ground]}"
    place = f"{draws.choose(PLACES)} {_article(wall)} {wall} {draws.choose(WALLS)}"
    return f"{draws.choose(OPENINGS)}{objects} {place}"


def _object(scene: Scene, index: int, draws: _Draws) -> str:
    """Words for one of the objects."""
    sizes = SIZE_WORDS[scene.size[index]]
    words = [draws.choose(sizes)] if sizes else []
    if draws.chance(0.08):
        words.append(draws.choose(FILLERS))
    if draws.chance(0.03):
        words.append("".join([draws.choose(LETTERS) for _ in range(3 + draws.whole(5))]))
    words += [COLOURS[scene.colour[index]], draws.choose(SHAPE_WORDS[scene.shape[index]])]
    motion = draws.choose(MOTION_WORDS[scene.motion[index]])
    if scene.speed[index] == 2:
        after = draws.chance(0.6)
        adverb = draws.choose(("quickly", "fast")) if after else "quickly"
        motion = f"{motion} {adverb}" if after else f"{adverb} {motion}"
    if scene.speed[index] == 0:
        motion = f"{motion} slowly" if draws.chance(0.6) else f"slowly {motion}"
    return f"{_article(words[0])} {' '.join(words)} {motion}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


HELD_OUT_SEED = 2**31 - 1
HELD_OUT = 256
CHOICE = 768
_CHOICE_FIRST = 4096


class Asked(NamedTuple):
    """Captions that no clip of training is drawn from.

    Attributes:
      captions: the words.
      scenes: what they ask for.
      keys: of clips that show it.
    """

    captions: tuple[str, ...]
    scenes: Scene
    keys: Key[Array, "B"]


@functools.cache
def held_out(two: bool) -> Asked:
    """256 captions that training is kept from, of one object or of two: scores are of these."""
    return _ask(HELD_OUT * two, HELD_OUT, two)


@functools.cache
def for_choosing(two: bool) -> Asked:
    """768 others, to choose between weights by: what chose can't also be what is reported.

    A short one may happen to be among training's own.
    """
    return _ask(_CHOICE_FIRST, CHOICE, two)


def _ask(first: int, count: int, two: bool) -> Asked:
    keys = clip_keys(HELD_OUT_SEED, first, count)
    scenes = make_scenes(keys, two=float(two))
    return Asked(tuple(make_captions(keys, scenes)), scenes, keys)


@functools.cache
def held_out_captions() -> frozenset[str]:
    """All 512 of them, to pass as `avoid`."""
    return frozenset(held_out(False).captions + held_out(True).captions)
