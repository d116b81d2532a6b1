"""How near one video is to another: PSNR, SSIM, mean squared error."""

import jax
import numpy as np
from jaxtyping import Float, Shaped, UInt8
from skimage.metrics import structural_similarity

from astraea_jax import checks
from astraea_jax.checks import Refusal

_SSIM_WINDOW = 7

_NUMBERS = "biufV"
"""Kinds of NumPy dtypes that are real numbers; V is how it sees bfloat16."""


def psnr(reference: UInt8[np.ndarray, "F H W 3"], video: UInt8[np.ndarray, "F H W 3"]) -> float:
    """Peak signal-to-noise ratio in dB: over the RGB values of a frame, then the mean of frames.

    Identical videos give infinity. In videos that differ, a frame without any difference counts
    as if one of its values were off by one grey level, so that it can't hide the other frames.

    Args:
      reference: uint8 video.
      video: what is compared with it.

    Raises:
      Refusal: no uint8 videos [F, H, W, 3] of equal shape.

    Source: ASTRAEA 4.1 (frame by frame) and A.2 (scikit-image's function).
    """
    _check_videos(reference, video)
    errors = np.array([mse(*pair) for pair in zip(reference, video, strict=True)])
    if not errors.any():
        return float("inf")
    least = 1 / reference[0].size
    return float(np.mean(10 * np.log10(255**2 / np.maximum(errors, least))))


def ssim(reference: UInt8[np.ndarray, "F H W 3"], video: UInt8[np.ndarray, "F H W 3"]) -> float:
    """Structural similarity, at most 1 (identical): the mean of frames.

    Uniform 7x7 windows over each of R, G and B, the default of scikit-image.

    Args:
      reference: uint8 video of at least 7 x 7 pixels.
      video: what is compared with it.

    Raises:
      Refusal: no uint8 videos [F, H, W, 3] of equal shape, or frames smaller than a window.

    Source: as `psnr`.
    """
    _check_videos(reference, video)
    if min(reference.shape[1:3]) < _SSIM_WINDOW:
        raise Refusal(
            f"SSIM needs frames of at least {_SSIM_WINDOW}x{_SSIM_WINDOW} pixels; "
            f"got {reference.shape[1]}x{reference.shape[2]}"
        )
    frames = [
        structural_similarity(*pair, win_size=_SSIM_WINDOW, channel_axis=-1, data_range=255)
        for pair in zip(reference, video, strict=True)
    ]
    return float(np.mean(frames))


def mse(
    reference: Shaped[np.ndarray | jax.Array, "*S"], video: Shaped[np.ndarray | jax.Array, "*S"]
) -> float:
    """Mean squared difference of two arrays of equal shape, in the square of their unit.

    Raises:
      Refusal: shapes that differ, or no arrays of numbers.
    """
    for name, value in (("reference", reference), ("video", video)):
        if checks.array(name, value).dtype.kind not in _NUMBERS:
            raise Refusal(f"{name} must be an array of numbers; got {value.dtype}")
    if reference.shape != video.shape:
        raise Refusal(
            f"expected two arrays of equal shape; got {reference.shape} and {video.shape}"
        )
    reference, video = jax.device_get((reference, video))
    difference = reference.astype(np.float64) - video.astype(np.float64)
    return float(np.mean(np.square(difference)))


def to_uint8(video: Float[np.ndarray | jax.Array, "*S"]) -> UInt8[np.ndarray, "*S"]:
    """Grey levels 0..255 of values in [0, 1], rounded to the nearest; what lies outside is clipped.

    Raises:
      Refusal: values that are no floats, or NaN among them.
    """
    values = jax.device_get(checks.array("video", video))
    if values.dtype.kind in "biu":
        raise Refusal(f"expected floats in [0, 1]; got {values.dtype}: it needs no conversion")
    if values.dtype.kind not in _NUMBERS:
        raise Refusal(f"expected floats in [0, 1]; got {values.dtype}")
    values = values.astype(np.float32)
    if np.isnan(values).any():
        raise Refusal(f"expected floats in [0, 1]; got {np.isnan(values).sum()} NaN among them")
    return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)


def _check_videos(reference: np.ndarray, video: np.ndarray) -> None:
    for name, value in (("reference", reference), ("video", video)):
        checks.array(name, value, "[F, H, W, 3]")
        if value.dtype != np.uint8 or value.ndim != 4 or value.shape[-1] != 3 or not value.size:
            raise Refusal(
                f"{name} must be a uint8 video [F, H, W, 3]; got {value.dtype} {value.shape}: "
                "floats in [0, 1] go through to_uint8 first"
            )
    if reference.shape != video.shape:
        raise Refusal(
            f"expected two videos of equal shape; got {reference.shape} and {video.shape}"
        )
