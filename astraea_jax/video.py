"""Videos in and out of files, and the pictures that show what a method did to them.

A video is uint8 [F, H, W, 3], or floats in [0, 1] of that shape; what is returned is uint8.
"""

import fractions
import os
import pathlib
import textwrap
from collections.abc import Sequence

import av
import jax
import numpy as np
from av.codec.codec import UnknownCodecError
from av.error import FFmpegError
from av.video.reformatter import ColorRange
from jaxtyping import Shaped, UInt8
from PIL import Image, ImageDraw, ImageFont

from astraea_jax import checks, files
from astraea_jax.checks import Refusal
from astraea_jax.metrics import to_uint8

VIDEO_SUFFIXES = (".mp4", ".gif")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")

_QUALITY = "17"
"""x264's constant rate factor: lower is better and larger; 17 looks lossless."""

_LARGEST_SIDE = 16384
"""Pixels; x264 and its players know no more."""

_SLOWEST, _FASTEST = fractions.Fraction(1, 100), 1000
_FILM_RATES = (24, 30, 48, 60, 120)
"""Frames a second that television slows by 1000/1001 and writes as 23.976, 29.97, ..."""

_HD_ROWS = 720
"""From here on players take BT.709 for the colours of a file that does not say, below BT.601."""

_BT709, _BT601 = 1, 6
"""Of matrix, primaries and transfer alike, as H.264 counts them (ITU-T H.273)."""

_MATRICES = {_BT709: 1, 4: 4, 5: 5, _BT601: 5, 7: 7, 9: 9}
"""A frame's tag (H.273) -> swscale's number of its matrix."""

_GAP = 4
_BAR = 42
_LARGEST_FONT, _SMALLEST_FONT = 16, 9
_LONGEST_TITLE = 400  # letters; two lines hold fewer, and to break more takes seconds
_GAINS = (50, 20, 10, 5, 2)
_DIMMED = 0.25

Video = Shaped[np.ndarray | jax.Array, "F H W 3"]
Pixels = UInt8[np.ndarray, "_ _ _ 3"]
Picture = UInt8[np.ndarray, "_ _ 3"]


def check_output(path: str | os.PathLike) -> pathlib.Path:
    """Returns `path` if a video can be written there; call it before any long work.

    Raises:
      Refusal: the folder does not exist or can't be written to, `path` is a folder, or its
        suffix is neither .mp4 nor .gif.
    """
    return files.check_output(path, VIDEO_SUFFIXES)


def write_video(
    path: str | os.PathLike, video: Video, *, fps: float | fractions.Fraction = 16
) -> None:
    """Writes an .mp4 (H.264) or a .gif; the file is there whole or not at all.

    An .mp4 says what its colours are (BT.709 from 720 rows, BT.601 below) and has its index before
    its frames, so that it plays while it is fetched. Odd sizes get one more row or column there,
    since it knows even sizes only. A .gif counts time in hundredths of a second, so its frame rate
    is the nearest that this allows.

    Args:
      path: where to; the suffix decides the format.
      video: the frames.
      fps: frames per second in 0.01..1000, exact where it is an int or a Fraction; 23.976 and its
        like mean 24000/1001.

    Raises:
      Refusal: as `check_output`; no video, or one of more than 16384 pixels a side; no frame rate;
        or it could not be encoded or written.
    """
    path = check_output(path)
    frames, rate = _frames(video), _rate(fps)
    if max(frames.shape[1:3]) > _LARGEST_SIDE:
        raise Refusal(
            f"expected a video of at most {_LARGEST_SIDE} pixels a side; got "
            f"{frames.shape[1]}x{frames.shape[2]}: write fewer panels"
        )
    write = _write_gif if path.suffix.lower() == ".gif" else _write_mp4
    try:
        with files.replacing(path) as partial:
            write(partial, frames, rate)
    except (FFmpegError, UnknownCodecError) as error:
        raise Refusal(
            f"can't write {path} ({files.reason(error)}): make room, or choose another name or .gif"
        ) from error


def read_video(path: str | os.PathLike) -> Pixels:
    """Reads every frame of a video file, its colours as the file says or as players guess.

    Raises:
      Refusal: no such file, or nothing in it that can be decoded.
    """
    files.check_input(path, what="video file")
    try:
        with av.open(os.fspath(path)) as container:
            frames = [_to_rgb(frame) for frame in container.decode(video=0)]
    except (OSError, FFmpegError, IndexError) as error:
        raise Refusal(f"expected a video file at {path}; {error}") from error
    if not frames:
        raise Refusal(f"expected a video file at {path}; it holds no frame")
    return np.stack(frames)


def write_image(path: str | os.PathLike, image: Shaped[np.ndarray | jax.Array, "H W 3"]) -> None:
    """Writes a .png or .jpg; the file is there whole or not at all.

    Raises:
      Refusal: a path that can't be written, another suffix, or no picture.
    """
    path = files.check_output(path, IMAGE_SUFFIXES)
    (frame,) = _frames(np.asarray(checks.array("image", image, "[H, W, 3]"))[None])
    with files.replacing(path) as partial:
        Image.fromarray(frame).save(partial, quality=95)


def enlarge(video: Video, minimum: int = 256) -> Pixels:
    """Repeats pixels by the least whole factor that makes the shorter side `minimum` or more."""
    checks.whole("minimum", minimum, 1, _LARGEST_SIDE, unit="pixels")
    frames = _frames(video)
    factor = max(1, -(-minimum // min(frames.shape[1:3])))
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def difference(reference: Video, video: Video, gain: float | None = None) -> tuple[Pixels, float]:
    """Absolute difference of two videos times a gain, and the gain.

    Args:
      reference: a video.
      video: another of the same shape.
      gain: factor; None takes the largest of 1, 2, 5, 10, 20, 50 that clips at most one value
        in a thousand.

    Raises:
      Refusal: shapes that differ, or no videos.
    """
    first, second = _same_shape([reference, video])
    if gain is not None:
        checks.number("gain", gain, 0, 255, above=True)
    absolute = np.abs(first.astype(np.int16) - second)
    if gain is None:
        bright = np.quantile(absolute, 0.999)
        gain = next((gain for gain in _GAINS if gain * bright <= 255), 1)
    return np.clip(np.rint(absolute * gain), 0, 255).astype(np.uint8), float(gain)


def light_up(video: Video, mask: Shaped[np.ndarray | jax.Array, "F H W"]) -> Pixels:
    """Dims every pixel whose token was not computed.

    Args:
      video: the frames.
      mask: 1 (or True) where a pixel's token was computed, 0 where not; a share in between for
        pixels that several computed tokens share.

    Raises:
      Refusal: a mask that is not of the video's size.
    """
    frames, mask = _frames(video), np.asarray(checks.array("mask", mask, "[F, H, W]"))
    if mask.shape != frames.shape[:3]:
        raise Refusal(f"expected a mask of shape {frames.shape[:3]}; got {mask.shape}")
    mask = mask.astype(np.float32)
    if np.isnan(mask).any():
        raise Refusal(f"expected a mask of shares in 0..1; got {np.isnan(mask).sum()} NaN in it")
    light = _DIMMED + (1 - _DIMMED) * np.clip(mask, 0, 1)
    return np.rint(frames * light[..., None]).astype(np.uint8)


def side_by_side(videos: Sequence[Video], titles: Sequence[str]) -> Pixels:
    """Panels in a row, each under its title.

    Raises:
      Refusal: no videos, shapes that differ, or another number of titles.
    """
    panels = _same_shape(videos)
    _check_number("titles", titles, panels)
    titled = [_titled(panel, title) for panel, title in zip(panels, titles, strict=True)]
    return _join(titled, axis=2)


def film_strip(video: Video, count: int) -> Picture:
    """Frames of a video in a row, evenly spaced, the first and the last among them.

    Raises:
      Refusal: a count below 1 or above the number of frames.
    """
    frames = _frames(video)
    checks.whole("count", count, 1, len(frames), unit="(the frames)")
    chosen = np.rint(np.linspace(0, len(frames) - 1, count)).astype(int)
    return np.concatenate(list(frames[chosen]), axis=1)


def contact_sheet(
    videos: Sequence[Video], captions: Sequence[str], *, columns: int, frames_per_video: int = 5
) -> Picture:
    """A film strip of each video under its caption, row by row.

    Args:
      videos: of equal shape.
      captions: one a video.
      columns: strips in a row, at least 1.
      frames_per_video: frames in a strip.

    Raises:
      Refusal: no videos, shapes that differ, or another number of captions.
    """
    checks.whole("columns", columns, 1, _LARGEST_SIDE)
    frames = _same_shape(videos)
    _check_number("captions", captions, frames)
    cells = [
        _titled(film_strip(video, frames_per_video)[None], caption)[0]
        for video, caption in zip(frames, captions, strict=True)
    ]
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % columns)
    rows = [_join(cells[start : start + columns], 1) for start in range(0, len(cells), columns)]
    return _join(rows, 0)


def _rate(fps: float | fractions.Fraction) -> fractions.Fraction:
    """Frames per second as the exact fraction that is meant."""
    known = int | float | fractions.Fraction | np.integer | np.floating
    number = isinstance(fps, known) and not isinstance(fps, bool)
    if not number or not _SLOWEST <= fps <= _FASTEST:
        raise Refusal(
            "fps must be a number or a Fraction of frames per second in 0.01..1000; got "
            f"{checks.shown(fps)}"
        )
    if isinstance(fps, fractions.Fraction):
        return fps.limit_denominator(1 << 16)  # a file has 32 bits for it
    for film in _FILM_RATES:
        slowed = fractions.Fraction(film * 1000, 1001)
        if abs(fps - slowed) < 0.005:
            return slowed
    return fractions.Fraction(float(fps)).limit_denominator(1000)


def _write_mp4(path: pathlib.Path, frames: np.ndarray, rate: fractions.Fraction) -> None:
    odd_rows, odd_columns = frames.shape[1] % 2, frames.shape[2] % 2
    frames = np.pad(frames, ((0, 0), (0, odd_rows), (0, odd_columns), (0, 0)), mode="edge")
    colours = _BT709 if frames.shape[1] >= _HD_ROWS else _BT601
    with av.open(os.fspath(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": _QUALITY})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = colours
        codec.color_range = int(ColorRange.MPEG)
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=_MATRICES[colours],
                dst_color_range=ColorRange.MPEG,
            )
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def _to_rgb(frame: av.VideoFrame) -> np.ndarray:
    if frame.format.is_rgb or frame.format.has_palette:
        return frame.to_ndarray(format="rgb24")
    guess = _BT709 if frame.height >= _HD_ROWS else _BT601
    matrix = _MATRICES.get(frame.colorspace, _MATRICES[guess])
    # RGB has no matrix, but older PyAV heeds the one before only if another is named after.
    return frame.reformat(
        format="rgb24", src_colorspace=matrix, dst_colorspace=_MATRICES[_BT601]
    ).to_ndarray()


def _write_gif(path: pathlib.Path, frames: np.ndarray, rate: fractions.Fraction) -> None:
    first, *rest = [Image.fromarray(frame) for frame in frames]
    milliseconds = max(10, 10 * round(100 / rate))
    first.save(path, save_all=True, append_images=rest, duration=milliseconds, loop=0)


def _frames(video: np.ndarray | jax.Array) -> np.ndarray:
    """The video as uint8; Refusal if it is none."""
    try:
        frames = np.asarray(video)
    except ValueError as error:  # a list of lists of several lengths
        raise Refusal(f"expected a video [F, H, W, 3]; got {checks.shown(video)}") from error
    if frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise Refusal(f"expected a video [F, H, W, 3]; got an array of shape {frames.shape}")
    return frames if frames.dtype == np.uint8 else to_uint8(frames)


def _same_shape(videos: Sequence[np.ndarray | jax.Array]) -> list[np.ndarray]:
    if not isinstance(videos, Sequence | np.ndarray | jax.Array) or isinstance(videos, str):
        raise Refusal(f"expected videos [F, H, W, 3]; got {checks.shown(videos)}")
    frames = [_frames(video) for video in videos]
    shapes = sorted({video.shape for video in frames})
    if len(shapes) != 1:
        raise Refusal(f"expected videos of one shape; got {shapes or 'no video'}")
    return frames


def _check_number(what: str, texts: Sequence[str], videos: Sequence) -> None:
    if not isinstance(texts, Sequence) or isinstance(texts, str):
        raise Refusal(f"expected {what} as a list of texts; got {checks.shown(texts)}")
    if len(texts) != len(videos):
        raise Refusal(f"expected {len(videos)} {what}, one a video; got {len(texts)}")


def _join(panels: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """Puts panels of one shape beside each other with white gaps between them."""
    shape = list(panels[0].shape)
    shape[axis] = _GAP
    gap = np.full(shape, 255, np.uint8)
    return np.concatenate([part for panel in panels for part in (gap, panel)][1:], axis=axis)


def _titled(frames: np.ndarray, title: str) -> np.ndarray:
    """The frames with a bar above them: black on white, at most two lines, as large as fits."""
    if not isinstance(title, str):
        raise Refusal(f"expected a title as text; got {checks.shown(title)}")
    title = title[:_LONGEST_TITLE]
    width, height = frames.shape[2], _BAR
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for size in range(_LARGEST_FONT, _SMALLEST_FONT - 1, -1):
        font = ImageFont.load_default(size)
        # Half the size is about the width of a letter; the box then tells whether it was.
        lines = textwrap.wrap(title, max(1, 2 * (width - 8) // size))
        text = "\n".join(lines[:2])
        left, _, right, _ = draw.multiline_textbbox((0, 0), text, font=font)
        if len(lines) <= 2 and right - left <= width - 8:
            break
    draw.multiline_text((4, height // 2), text, font=font, fill="black", anchor="lm")
    bar = np.broadcast_to(np.asarray(image), (len(frames), height, width, 3))
    return np.concatenate([bar, frames], axis=1)
