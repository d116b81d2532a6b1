"""The VAE in pieces: cut in time and space, so that its memory is that of a piece.

In time the causal layers hand on the frames that the next piece needs. In space only the layers
that see a neighbourhood are cut, and each tile carries a rim as wide as they see; the attention
sees whole frames, at the size of the latents. So the numbers are those of the clip in one piece,
but for rounding, and nothing is blended.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from astraea_jax.checks import Refusal
from astraea_jax.timing import timed_jit

MOST_PIXELS = 1 << 21
"""Pixels of a piece, where a caller lets us choose: about 6 kB each at Wan's widths, float32."""


Part = tuple[Array, list[Array]]
"""What a part of a VAE gives: its result, and what the next piece in time needs."""


class Tile(NamedTuple):
    """A tile along one axis, in latent positions: with its rim, and what is kept of it."""

    start: int
    stop: int
    keep_start: int
    keep_stop: int


@runtime_checkable
class Sizes(Protocol):
    """What a VAE says of its sizes."""

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent position, along height and along width."""
        ...

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame, after the first."""
        ...

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        ...

    @property
    def image_channels(self) -> int:
        """Channels of a picture."""
        ...

    @property
    def decode_rim(self) -> int:
        """How far `decode_leave` sees, in latent positions."""
        ...

    @property
    def encode_rim(self) -> int:
        """How far `encode_enter` sees, in latent positions."""
        ...


@runtime_checkable
class VAE(Protocol):
    """A causal VAE in two parts each way: one sees whole frames, the other a neighbourhood.

    Each part takes a piece of a clip and what the piece before left (None for the first), and
    returns its result and what the next piece needs.
    """

    @property
    def config(self) -> Sizes:
        """Its sizes."""
        ...

    def decode(self, latents: Array) -> Array:
        """Normalised latents to a video in -1..1, in one piece."""
        ...

    def encode(self, video: Array) -> Array:
        """A video in -1..1 to normalised latents, in one piece."""
        ...

    def decode_enter(self, latents: Array, before: Sequence[Array] | None) -> Part:
        """Latents to features of their size, seeing whole frames."""
        ...

    def decode_leave(self, features: Array, before: Sequence[Array] | None) -> Part:
        """Features to pixels."""
        ...

    def encode_enter(self, video: Array, before: Sequence[Array] | None) -> Part:
        """Pixels to features of the latents' size."""
        ...

    def encode_leave(self, features: Array, before: Sequence[Array] | None) -> Part:
        """Features to latents, seeing whole frames."""
        ...

    def check_latents(self, latents: Array) -> None:
        """Refuses what are no latents."""
        ...

    def check_video(self, video: Array) -> None:
        """Refuses what is no video of a size that has latents."""
        ...


def pieces(config: Sizes, grid: tuple[int, int, int]) -> tuple[tuple[int, int] | None, int] | None:
    """How to cut latents of this many frames, rows and columns: (tile, frames), None for whole.

    The tile is halved along its longer side until one latent frame of it is small enough.
    """
    frames, rows, columns = grid
    space, time = config.spatial_factor**2, config.temporal_factor
    if frames * time * rows * columns * space <= MOST_PIXELS:
        return None
    tile = [rows, columns]
    while time * tile[0] * tile[1] * space > MOST_PIXELS:
        longer = int(tile[1] > tile[0])
        tile[longer] = -(-tile[longer] // 2)
    length = max(1, MOST_PIXELS // (time * tile[0] * tile[1] * space))
    whole = tile == [rows, columns]
    return None if whole else (tile[0], tile[1]), length


def decode(
    model: VAE,
    latents: Float[Array, "B f h w C"],
    *,
    tile: tuple[int, int] | None = None,
    frames: int = 1,
) -> Float[np.ndarray, "B F height width 3"]:
    """`VAE.decode` in pieces.

    Args:
      model: the VAE.
      latents: normalised.
      tile: rows and columns of latents that a tile keeps; None cuts in time only.
      frames: latent frames of a piece; the first frame is a piece of its own.

    Returns:
      The video in -1..1, in host memory.
    """
    config = model.config
    model.check_latents(latents)
    frames = _dividing(latents.shape[1] - 1, frames)
    features = jnp.concatenate(list(_stream(decode_enter, model, latents, 1, frames)), 1)
    factor, time = config.spatial_factor, config.temporal_factor
    batch, length, rows, columns = features.shape[:4]
    video = np.empty(
        (batch, time * (length - 1) + 1, rows * factor, columns * factor, config.image_channels),
        np.float32,
    )
    for y, x in _tiles((rows, columns), tile, config.decode_rim):
        piece = _window(features, slice(y.start, y.stop), slice(x.start, x.stop))
        done = 0
        for out in _stream(decode_leave, model, piece, 1, frames):
            kept = _kept(out, y, x, factor)
            _place(video[:, done : done + out.shape[1]], kept, y, x, factor)
            done += out.shape[1]
    return video


def encode(
    model: VAE,
    video: Float[Array, "B F height width 3"],
    *,
    tile: tuple[int, int] | None = None,
    frames: int = 1,
) -> Float[Array, "B f h w C"]:
    """`VAE.encode` in pieces; arguments as of `decode`."""
    config = model.config
    model.check_video(video)
    factor, time = config.spatial_factor, config.temporal_factor
    grid = video.shape[2] // factor, video.shape[3] // factor
    length = (video.shape[1] - 1) // time + 1
    frames = _dividing(length - 1, frames)
    features = None
    for y, x in _tiles(grid, tile, config.encode_rim):
        # Cut from the video while it may still be in host memory.
        piece = _window(
            video,
            slice(y.start * factor, y.stop * factor),
            slice(x.start * factor, x.stop * factor),
        )
        done = 0
        for out in _stream(encode_enter, model, piece, 1, time * frames):
            kept = _kept(out, y, x, 1)
            if features is None:
                shape = (video.shape[0], length, *grid, kept.shape[-1])
                features = np.empty(shape, kept.dtype)
            _place(features[:, done : done + out.shape[1]], kept, y, x, 1)
            done += out.shape[1]
    assert features is not None, "there is at least one tile"
    return jnp.concatenate(list(_stream(encode_leave, model, features, 1, frames)), 1)


@timed_jit(donate=("before",))
def decode_enter(model: VAE, latents, before):
    """A piece in time through the decoder's first part, and what it leaves for the next."""
    return model.decode_enter(latents, before)


@timed_jit(donate=("before",))
def decode_leave(model: VAE, features, before):
    """The same for the decoder's second part, and clamped."""
    video, kept = model.decode_leave(features, before)
    return jnp.clip(video, -1.0, 1.0), kept


@timed_jit(donate=("before",))
def encode_enter(model: VAE, video, before):
    """The same for the encoder's first part."""
    return model.encode_enter(video, before)


@timed_jit(donate=("before",))
def encode_leave(model: VAE, features, before):
    """The same for the encoder's second part."""
    return model.encode_leave(features, before)


def _frames(clip: Array | np.ndarray, start: int, stop: int) -> Array:
    """Frames of a clip, sent to the device by name where they are in host memory."""
    if isinstance(clip, np.ndarray):
        return jax.device_put(clip[:, start:stop])
    return jax.lax.slice_in_dim(clip, start, stop, axis=1)


def _window(clip, rows: slice, columns: slice):
    """A part of every frame, where the clip is: no index of it is sent to a device unasked."""
    if isinstance(clip, np.ndarray):
        return clip[:, :, rows, columns]
    clip = jax.lax.slice_in_dim(clip, rows.start, rows.stop, axis=2)
    return jax.lax.slice_in_dim(clip, columns.start, columns.stop, axis=3)


def _stream(run: Callable, model: VAE, clip, first: int, frames: int) -> Iterator[Array]:
    """Runs a clip's first frames, then piece after piece."""
    before, start = None, 0
    while start < clip.shape[1]:
        stop = start + (frames if start else first)
        out, before = run(model, _frames(clip, start, stop), before)
        yield jax.block_until_ready(out)
        start = stop


def _dividing(count: int, most: int) -> int:
    """The largest length of pieces, at most `most`, that divides `count`: all are then alike."""
    return max((n for n in range(1, min(most, count) + 1) if count % n == 0), default=1)


def _tiles(
    grid: tuple[int, int], tile: tuple[int, int] | None, rim: int
) -> Iterator[tuple[Tile, Tile]]:
    """Tiles of a frame, all of one shape; on the frame's edge a tile ends with the frame."""
    if tile is None:
        tile = grid
    if min(tile) < 1:
        raise Refusal(f"a tile must have at least one row and column; got {tile}")
    for y in _cut(grid[0], tile[0], rim):
        for x in _cut(grid[1], tile[1], rim):
            yield y, x


def _cut(size: int, tile: int, rim: int) -> Iterator[Tile]:
    length = min(size, tile + 2 * rim)
    for keep in range(0, size, tile):
        start = min(max(0, keep - rim), size - length)
        yield Tile(start, start + length, keep, min(keep + tile, size))


def _kept(out: Array, y: Tile, x: Tile, factor: int) -> np.ndarray:
    """What a tile computed, without its rim, on the host."""
    rows = slice((y.keep_start - y.start) * factor, (y.keep_stop - y.start) * factor)
    columns = slice((x.keep_start - x.start) * factor, (x.keep_stop - x.start) * factor)
    return jax.device_get(_window(out, rows, columns))


def _place(target: np.ndarray, kept: np.ndarray, y: Tile, x: Tile, factor: int) -> None:
    rows = slice(y.keep_start * factor, y.keep_stop * factor)
    columns = slice(x.keep_start * factor, x.keep_stop * factor)
    target[:, :, rows, columns] = kept
