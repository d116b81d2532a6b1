"""PSNR, SSIM and MSE against scikit-image and against values worked out by hand."""

import math
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from astraea_jax import metrics


@pytest.fixture
def videos():
    random = np.random.default_rng(0)
    reference = random.integers(0, 256, (3, 16, 24, 3), np.uint8)
    noise = random.integers(-9, 10, reference.shape)
    return reference, np.clip(reference + noise, 0, 255).astype(np.uint8)


def test_psnr_is_the_mean_over_frames(videos):
    reference, video = videos
    frames = [peak_signal_noise_ratio(a, b, data_range=255) for a, b in zip(*videos, strict=True)]
    assert metrics.psnr(reference, video) == pytest.approx(np.mean(frames), rel=1e-12)


def test_psnr_of_one_grey_level(videos):
    reference = np.full((2, 8, 8, 3), 100, np.uint8)
    assert metrics.psnr(reference, reference + np.uint8(1)) == pytest.approx(48.1308, abs=1e-4)


def test_psnr_of_identical_videos_is_infinite(videos):
    assert metrics.psnr(videos[0], videos[0]) == math.inf


def test_an_equal_frame_does_not_hide_the_others():
    reference = np.full((2, 8, 8, 3), 100, np.uint8)
    video = reference.copy()
    video[1] += 1
    one_level, one_value = 20 * math.log10(255), 10 * math.log10(255**2 * 8 * 8 * 3)
    assert metrics.psnr(reference, video) == pytest.approx((one_level + one_value) / 2)


def test_ssim_is_the_mean_over_frames(videos):
    frames = [structural_similarity(a, b, channel_axis=-1) for a, b in zip(*videos, strict=True)]
    assert metrics.ssim(*videos) == pytest.approx(np.mean(frames), rel=1e-12)
    assert metrics.ssim(videos[0], videos[0]) == pytest.approx(1)


def test_mse_does_not_wrap_around_in_uint8():
    assert metrics.mse(np.array([0, 255], np.uint8), np.array([255, 0], np.uint8)) == 255**2
    assert metrics.mse(jnp.zeros((2, 3)), jnp.full((2, 3), 2.0)) == 4


def test_to_uint8_rounds_and_clips():
    video = np.array([-0.5, 0, 0.4999 / 255, 0.5001 / 255, 1, 2], np.float32)
    assert metrics.to_uint8(video).tolist() == [0, 0, 0, 1, 255, 255]
    assert metrics.to_uint8(jnp.ones((1, 2), jnp.bfloat16)).tolist() == [[255, 255]]


def test_every_grey_level_survives_the_round_trip():
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(metrics.to_uint8(levels.astype(np.float32) / 255), levels)


BAD_PAIRS = {
    "floats": (np.zeros((1, 8, 8, 3), np.float32),) * 2,
    "no frame axis": (np.zeros((8, 8, 3), np.uint8),) * 2,
    "no frames": (np.zeros((0, 8, 8, 3), np.uint8),) * 2,
    "shapes": (np.zeros((1, 8, 8, 3), np.uint8), np.zeros((2, 8, 8, 3), np.uint8)),
}


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("metric", [metrics.psnr, metrics.ssim])
@pytest.mark.parametrize("pair", BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_what_is_no_pair_of_videos(metric, pair):
    with pytest.raises(ValueError, match="got"):
        metric(*pair)


@pytest.mark.usefixtures("as_a_user")
def test_other_bad_input():
    with pytest.raises(ValueError, match=r"equal shape; got \(2,\) and \(3,\)"):
        metrics.mse(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="at least 7x7 pixels; got 6x9"):
        metrics.ssim(*(np.zeros((1, 6, 9, 3), np.uint8),) * 2)
    with pytest.raises(ValueError, match="got 1 NaN"):
        metrics.to_uint8(np.array([np.nan, 1]))
    with pytest.raises(ValueError, match="got uint8: it needs no conversion"):
        metrics.to_uint8(np.zeros(2, np.uint8))


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
