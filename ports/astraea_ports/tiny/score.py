"""Reads shape, colour, motion, background and texture back from a video of the small Wan's kind.

The reader is a small convolutional network, trained on rendered clips (and on clips through the
VAE); its weights ship. It errs too: every score stands beside what it makes of the truth, rendered
and after a pass through the VAE. Of 256 held-out clips with one object and 256 with two it reads
99.2 % or more of each attribute right, either way.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from astraea_jax import checks, files
from astraea_jax.checks import Refusal
from astraea_ports import checkpoints
from astraea_ports.checkpoints import export
from astraea_ports.tiny import scenes
from astraea_ports.tiny.scenes import Scene

WEIGHTS = Path(__file__).parent / "score.safetensors"

HEADS = {
    "count": (2,),
    "shape": (2, len(scenes.SHAPES)),
    "colour": (2, len(scenes.COLOURS)),
    "motion": (2, len(scenes.MOTIONS)),
    "ground": (len(scenes.GROUNDS),),
    "texture": (len(scenes.TEXTURES),),
}
"""What is read and the shape of its logits; 2 is for the upper and the lower object."""

NUM_LOGITS = sum(map(math.prod, HEADS.values()))

OBJECT_ATTRIBUTES = ("shape", "colour", "motion")
ATTRIBUTES = (*OBJECT_ATTRIBUTES, "ground", "texture")
WORDS = {
    "shape": scenes.SHAPES,
    "colour": scenes.COLOURS,
    "motion": scenes.MOTIONS,
    "ground": scenes.GROUNDS,
    "texture": scenes.TEXTURES,
}
NUM_LOOKS = 9
"""Frames that the reader looks at."""
_PATCH = 4
_LARGEST = 64 << 20  # bytes of a file of weights; those that ship take 0.8 million


class Reading(NamedTuple):
    """What a video shows, as indices into the tuples of `scenes`; fields as in `scenes.Scene`."""

    count: Int[Array, "B"]
    shape: Int[Array, "B 2"]
    colour: Int[Array, "B 2"]
    motion: Int[Array, "B 2"]
    ground: Int[Array, "B"]
    texture: Int[Array, "B"]


class Reader(nnx.Module):
    """Nine frames in patches of 4x4 pixels; convolutions that halve space, then also time."""

    def __init__(self, rngs: nnx.Rngs):
        """Random weights."""

        def kernel(*shape: int) -> nnx.Param:
            return nnx.Param(nnx.initializers.he_normal()(rngs.params(), shape, jnp.float32))

        self.patches = kernel(_PATCH * _PATCH * 3, 32)
        self.near = kernel(3, 3, 32, 48)
        self.early = kernel(3, 3, 3 * 48, 64)
        self.late = kernel(3, 3, 3 * 64, 48)
        self.all = kernel(3 * 4 * 4 * 48, 128)
        self.out = nnx.Param(jnp.zeros((128, NUM_LOGITS), jnp.float32))
        self.out_bias = nnx.Param(jnp.zeros(NUM_LOGITS, jnp.float32))

    def __call__(self, frames: Float[Array, "B 9 128 128 3"]) -> dict[str, Array]:
        """Logits of each head."""
        x = _activate(_cut(frames - 0.5, _PATCH) @ self.patches[...])
        x = _activate(_convolve(x, self.near[...]))
        for weights in (self.early, self.late):
            x = _activate(_convolve(_every_other(x), weights[...]))
        x = _activate(x.reshape(x.shape[0], -1) @ self.all[...])
        flat = x @ self.out[...] + self.out_bias[...]
        ends = np.cumsum([math.prod(shape) for shape in HEADS.values()])[:-1]
        parts = jnp.split(flat, ends, axis=-1)
        return {
            name: part.reshape(-1, *shape)
            for (name, shape), part in zip(HEADS.items(), parts, strict=True)
        }


def _convolve(x: Array, kernel: Array) -> Array:
    """A 3x3 convolution of every frame with stride 2, as one product: fast backwards on a CPU too.

    Zeros on the right and below, as "SAME" has it for even sizes.
    """
    height, width = x.shape[2] // 2, x.shape[3] // 2
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)))
    taps = [
        x[:, :, i : i + 2 * height - 1 : 2, j : j + 2 * width - 1 : 2]
        for i in range(3)
        for j in range(3)
    ]
    return jnp.concatenate(taps, -1) @ kernel.reshape(-1, kernel.shape[-1])


def _cut(x: Array, side: int) -> Array:
    """Patches of side x side pixels, their pixels along the channels."""
    batch, frames, height, width, channels = x.shape
    x = x.reshape(batch, frames, height // side, side, width // side, side, channels)
    return x.swapaxes(3, 4).reshape(batch, frames, height // side, width // side, -1)


def _activate(x: Array) -> Array:
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-4)
    return jax.nn.gelu(x)


def _every_other(x: Array) -> Array:
    """Frames 0, 2, 4, ... with their neighbours' channels beside theirs."""
    padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
    count = (x.shape[1] + 1) // 2
    return jnp.concatenate([padded[:, i : i + 2 * count - 1 : 2] for i in range(3)], -1)


def looks(frames: int) -> np.ndarray:
    """Which frames of a video the reader looks at.

    Raises:
      Refusal: a video of fewer than nine frames.
    """
    if frames < NUM_LOOKS:
        raise Refusal(f"expected a video of at least {NUM_LOOKS} frames; got {frames}")
    return np.rint(np.linspace(0, frames - 1, NUM_LOOKS)).astype(int)


def check_size(size: Sequence[int]) -> None:
    """Refuses videos of frames, height and width that can't be read."""
    frames, *pixels = size
    looks(frames)
    if pixels != [scenes.SIDE, scenes.SIDE]:
        raise Refusal(
            f"expected videos of {scenes.SIDE}x{scenes.SIDE} pixels, as the small model makes; "
            f"got {' x '.join(map(str, pixels))}"
        )


@functools.cache
def reader() -> Reader:
    """The reader at `WEIGHTS`."""
    return load_reader(WEIGHTS)


def load_reader(path: Path) -> Reader:
    """Reads weights that `save_reader` wrote.

    Raises:
      Refusal: a file that is missing or broken, or holds another network or what is no number.
    """
    model = jax.eval_shape(lambda: Reader(nnx.Rngs(0)))
    table = [checkpoints.Entry(re.escape(n), n) for n in checkpoints.parameter_shapes(model)]
    try:
        files.check_input(path, what="file of weights", largest=_LARGEST)
        return checkpoints.load_parameters(path, model, table)
    except Refusal as error:
        raise Refusal(
            f"expected a reader's weights at {path}; make them with "
            f"`astraea train-tiny --part reader`: {error}"
        ) from error


def save_reader(model: Reader, path: Path) -> None:
    """Writes the weights in bfloat16; the file is there whole or not at all.

    Raises:
      Refusal: the disk is full or can't be written to.
    """
    leaves = zip(checkpoints.parameter_shapes(model), jax.tree.leaves(model), strict=True)
    export.write_tensors(
        path, {name: np.asarray(leaf).astype(ml_dtypes.bfloat16) for name, leaf in leaves}
    )


@jax.jit
def _read(model: Reader, frames: Float[Array, "B 9 128 128 3"]) -> Reading:
    return Reading(**{name: logits.argmax(-1) for name, logits in model(frames).items()})


def read(video: Float[Array, "B F height width 3"], model: Reader | None = None) -> Reading:
    """What each video shows.

    Args:
      video: in [0, 1].
      model: the reader; None is the one that ships.

    Returns:
      For each video; `count` is 0 for one object and 1 for two.

    Raises:
      Refusal: videos of another size, or of fewer than nine frames.
    """
    if checks.array("video", video, "[B,F,H,W,3]").ndim != 5 or not video.size:
        raise Refusal(f"expected videos [B,F,H,W,3]; got shape {tuple(video.shape)}")
    check_size(video.shape[1:4])
    if video.shape[-1] != 3:
        raise Refusal(f"expected videos of 3 colours; got {video.shape[-1]}")
    model = reader() if model is None else model
    return _read(model, jnp.asarray(video)[:, looks(video.shape[1])])


class Share(NamedTuple):
    """How many of how many were right."""

    right: int
    total: int

    @property
    def percent(self) -> float:
        """Share in percent; NaN of nothing."""
        return 100 * self.right / self.total if self.total else math.nan


def compare(reading: Reading, truth: Scene) -> dict[str, Share]:
    """How often each attribute was as asked; of two objects each counts for itself.

    Returns:
      A share for each of ATTRIBUTES, and "everything": videos with no attribute wrong.
    """
    count = np.asarray(truth.count)
    asked = np.arange(2) < count[:, None]
    shares, whole = {}, np.ones(len(count), bool)
    for name in ATTRIBUTES:
        right = np.asarray(getattr(reading, name)) == np.asarray(getattr(truth, name))
        counted = asked if name in OBJECT_ATTRIBUTES else np.ones(len(count), bool)
        whole &= (right | ~counted).reshape(len(count), -1).all(-1)
        shares[name] = Share(int((right & counted).sum()), int(counted.sum()))
    return shares | {"everything": Share(int(whole.sum()), len(count))}


class Mistake(NamedTuple):
    """One attribute that is not as asked.

    Attributes:
      video: its place in the batch.
      attribute: of ATTRIBUTES.
      asked: in words.
      read: in words.
    """

    video: int
    attribute: str
    asked: str
    read: str


def mistakes(reading: Reading, truth: Scene) -> list[Mistake]:
    """What `compare` counts as wrong, one by one, video by video."""
    count, found = np.asarray(truth.count), []
    for name in ATTRIBUTES:
        asked, read = np.asarray(getattr(truth, name)), np.asarray(getattr(reading, name))
        for place in np.argwhere(asked != read).tolist():
            if name not in OBJECT_ATTRIBUTES or place[1] < count[place[0]]:
                words = (WORDS[name][int(labels[tuple(place)])] for labels in (asked, read))
                found.append(Mistake(place[0], name, *words))
    return sorted(found)


def add(parts: Sequence[Mapping[str, Share]]) -> dict[str, Share]:
    """The shares of several batches together."""
    return {
        name: Share(*(sum(values) for values in zip(*(part[name] for part in parts), strict=True)))
        for name in parts[0]
    }
