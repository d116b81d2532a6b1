"""The Wan VAE against upstream's recorded tensors, at both sizes and full-size shapes."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import FIXTURES, LAYOUTS, full_size, slow_but
from safetensors.numpy import load_file

from astraea_ports import checkpoints
from astraea_ports.checkpoints.matching import match_tensors
from astraea_ports.pipeline import tiles
from astraea_ports.wan import vae as wan_vae
from astraea_ports.wan import vae_layers, vae_weights
from astraea_ports.wan.vae import VAE, VAEConfig
from astraea_ports.wan.vae_weights import load_vae

TINY = Path(wan_vae.__file__).parents[1] / "tiny" / "vae"
TOLERANCE = 2e-5  # the recordings' README; upstream's two versions differ by 3e-6


def channels_last(array):
    return np.ascontiguousarray(np.moveaxis(array, 1, -1))


def dev_config(**changes):
    recorded = load_file(FIXTURES / "wan/vae_io.safetensors")
    return {
        "base_dim": 4,
        "dim_mult": [1, 2, 2, 2],
        "num_res_blocks": 2,
        "temperal_downsample": [False, True, True],
        "z_dim": 16,
        "latents_mean": recorded["latents_mean"].tolist(),
        "latents_std": recorded["latents_std"].tolist(),
    } | changes


@pytest.fixture(scope="module")
def recorded():
    tensors = load_file(FIXTURES / "wan/vae_io.safetensors")
    return {k: channels_last(v) if v.ndim == 5 else v for k, v in tensors.items()}


@pytest.fixture(scope="module")
def small():
    return load_vae(FIXTURES / "wan/vae_diffusers.safetensors", config=dev_config())


@pytest.fixture(scope="module")
def shipped():
    return load_vae(TINY)


def test_decoder_intermediates(small, recorded):
    @jax.jit
    def run(vae, z):
        config, past = vae.config, vae_layers.Past()
        x = vae.post_quant.pointwise(
            z * jnp.asarray(config.latents_std) + jnp.asarray(config.latents_mean)
        )
        out = {"post_quant": x}
        x = out["conv_in"] = vae.decoder.conv_in.causal(x, past)
        x = out["mid"] = vae.decoder.mid(x, past)
        x = out["up0"] = vae.decoder.stages[0](x, past)
        out["up1"] = vae.decoder.stages[1](x, past)
        return out

    got = run(small, recorded["z"])
    np.testing.assert_allclose(got["post_quant"], recorded["i.dec.post_quant"], atol=TOLERANCE)
    for name in ("conv_in", "mid", "up0", "up1"):
        # One recording per latent frame; for up1 the last was not kept.
        keys = [f"i.dec.chunk{i}.{name}" for i in range(3) if f"i.dec.chunk{i}.{name}" in recorded]
        assert len(keys) >= 2
        expected = np.concatenate([recorded[key] for key in keys], axis=1)
        frames = expected.shape[1]
        np.testing.assert_allclose(got[name][:, :frames], expected, atol=TOLERANCE, err_msg=name)


def test_decode(small, recorded):
    video, clamped = jax.jit(lambda vae, z: (vae.decode(z, clamp=False), vae.decode(z)))(
        small, recorded["z"]
    )
    np.testing.assert_allclose(video, recorded["dec_unclamped"], atol=TOLERANCE)
    assert np.abs(recorded["dec_unclamped"]).max() > 1
    np.testing.assert_array_equal(clamped, np.clip(video, -1, 1))


def test_the_original_layout_is_the_same_model(small):
    same = load_vae(FIXTURES / "wan/vae_original.safetensors", config=dev_config())
    jax.tree.map(np.testing.assert_array_equal, same, small)
    recorded = load_file(FIXTURES / "wan/vae_io.safetensors")
    for name in ("latents_mean", "latents_std"):
        np.testing.assert_allclose(vae_weights.WAN_VAE[name], recorded[name], rtol=1e-6)


def test_encode(small, recorded):
    latents = jax.jit(VAE.encode)(small, recorded["pix"])
    np.testing.assert_allclose(latents, recorded["enc_mode_normalized"], atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_but({"square"}, ["square", "wide"]))
def test_shipped_checkpoint_decodes(shipped, name):
    fixture = load_file(FIXTURES / f"tiny_wan/{name}.safetensors")
    video = jax.jit(VAE.decode)(shipped, channels_last(fixture["latents"][-1:]))[0]
    grey = np.round((np.asarray(video) + 1) * 127.5)
    difference = np.abs(grey - fixture["video"].astype(np.float32))
    assert video.shape == fixture["video"].shape
    assert (difference <= 1).mean() >= 0.999
    assert (difference == 0).mean() >= 0.99  # only values on the edge of rounding may differ


@pytest.mark.slow
def test_shipped_checkpoint_encodes(shipped):
    fixture = load_file(FIXTURES / "tiny_wan/wide.safetensors")
    pixels = fixture["video"][None].astype(np.float32) / 127.5 - 1
    mean = np.asarray(jax.jit(VAE.encode)(shipped, pixels))
    # The mean was recorded of the 8-bit video, before normalisation.
    mean = mean * np.array(shipped.config.latents_std) + np.array(shipped.config.latents_mean)
    np.testing.assert_allclose(mean, channels_last(fixture["video_encoded_mean"]), atol=5e-5)


@pytest.fixture(scope="module")
def smallest():
    """A VAE of random weights that compiles soon: three sizes, the frames halved between two."""
    config = VAEConfig(4, 4, 2, (1, 2, 1), 1, (False, True), (0.1, -0.2), (2.0, 0.5))
    random = np.random.default_rng(0)

    def fill(slot):  # kernels of a scale that keeps activations near 1; quicker than nnx's random
        fan_in = np.prod(slot.shape[:-1]) if len(slot.shape) > 1 else 1
        return jnp.asarray(random.normal(size=slot.shape) * fan_in**-0.5, slot.dtype)

    return jax.tree.map(fill, jax.eval_shape(lambda: VAE(config, nnx.Rngs(0))))


@pytest.mark.slow
def test_one_frame_and_batch(smallest):
    latents = jax.random.normal(jax.random.key(0), (2, 3, 2, 3, 2))

    @jax.jit
    def run(vae, latents):
        video = vae.decode(latents)
        return video, vae.encode(video)

    both, encoded = run(smallest, latents)
    assert both.shape == (2, 5, 8, 12, 3)
    assert encoded.shape == latents.shape
    alone, encoded_alone = run(smallest, latents[1:, :1])
    assert alone.shape == (1, 1, 8, 12, 3)
    # Causal: the first frame knows nothing of the later ones, a clip nothing of the other.
    np.testing.assert_allclose(alone[0, 0], both[1, 0], atol=1e-6)
    np.testing.assert_allclose(encoded_alone[0, 0], encoded[1, 0], atol=1e-5)


@pytest.mark.slow
def test_pieces_give_what_the_whole_gives(smallest):
    latents = jax.random.normal(jax.random.key(1), (1, 5, 24, 6, 2))
    whole = jax.jit(VAE.decode)(smallest, latents)
    pieces = tiles.decode(smallest, latents, tile=(4, 3), frames=2)
    np.testing.assert_allclose(pieces, whole, atol=TOLERANCE)
    encoded = jax.jit(VAE.encode)(smallest, whole)
    pieces = tiles.encode(smallest, whole, tile=(4, 3), frames=2)
    np.testing.assert_allclose(pieces, encoded, atol=TOLERANCE)


def test_the_rim_is_what_the_layers_see(smallest):
    """What is no number spreads as far as a layer sees, and no further."""
    factor, broken = smallest.config.spatial_factor, 14

    @jax.jit
    def run(vae):
        features = jnp.zeros((1, 1, 28, 1, 4)).at[:, :, broken].set(jnp.nan)
        pixels = jnp.zeros((1, 1, 28 * factor, factor, 3)).at[:, :, broken * factor].set(jnp.nan)
        return vae.decode_leave(features)[0], vae.encode_enter(pixels)[0]

    video, encoded = (np.isnan(x[0, 0, :, 0, 0]).nonzero()[0] for x in run(smallest))
    rim = smallest.config.decode_rim
    assert rim == 8
    above, below = broken * factor - video.min(), video.max() - (broken * factor + factor - 1)
    assert (rim - 1) * factor < max(above, below) <= rim * factor
    rim = smallest.config.encode_rim
    assert rim == 6
    assert rim - 2 < max(broken - encoded.min(), encoded.max() - broken) <= rim


def test_pieces_keep_to_the_memory():
    config = VAEConfig.from_dict(vae_weights.WAN_VAE)
    assert config.decode_rim == 13 and config.encode_rim == 10
    assert tiles.pieces(config, (9, 16, 16)) is None
    for grid, tile in (((21, 60, 104), None), ((21, 90, 160), (90, 80))):
        cut = tiles.pieces(config, grid)
        assert cut == (tile, 1)
        rows, columns = tile or grid[1:]
        rim = 2 * config.decode_rim if tile else 0
        pixels = 4 * 64 * min(rows + rim, grid[1]) * min(columns + rim, grid[2])
        assert pixels <= tiles.MOST_PIXELS * 2


def test_gradient_of_the_norm_is_finite_at_zero():
    gradient = jax.grad(lambda x: vae_layers.rms_norm(x, jnp.ones(4)).sum())(jnp.zeros(4))
    assert np.isfinite(gradient).all()


def test_bfloat16_weights_give_float32_results(smallest):
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), smallest)
    latents = jnp.zeros((1, 2, 2, 3, 2), jnp.bfloat16)
    video = jax.eval_shape(VAE.decode, narrow, latents)
    assert video.dtype == jnp.float32
    assert jax.eval_shape(VAE.encode, narrow, video).dtype == jnp.float32
    features, _ = jax.eval_shape(VAE.decode_enter, narrow, latents)
    assert features.dtype == jnp.bfloat16


@pytest.mark.parametrize("layout", LAYOUTS)
def test_full_size_keys(layout):
    shapes = full_size("vae", layout)
    config = VAEConfig.from_dict(vae_weights.WAN_VAE)
    table = vae_weights.TABLE if layout == "diffusers" else vae_weights.original_table(config)
    template = jax.eval_shape(lambda: VAE(config, nnx.Rngs(0)))
    slots = checkpoints.parameter_shapes(template)
    tensors = [checkpoints.Tensor(k, "F32", tuple(s), Path("x")) for k, s in shapes.items()]
    matches = match_tensors(tensors, slots, table)
    assert sorted(m.tensor.key for found in matches.values() for m in found) == sorted(shapes)
    assert sum(np.prod(slot.shape) for slot in slots.values()) == 126_892_531
    decoded = jax.eval_shape(VAE.decode, template, jax.ShapeDtypeStruct((1, 21, 60, 104, 16), "f4"))
    assert decoded.shape == (1, 81, 480, 832, 3)
    encoded = jax.eval_shape(VAE.encode, template, decoded)
    assert encoded.shape == (1, 21, 60, 104, 16)


@pytest.mark.parametrize(
    "shape", [(2, 4, 4, 16), (1, 2, 4, 4, 3), (1, 16, 2, 4, 4), (1, 0, 4, 4, 16)]
)
def test_decode_refuses_shapes(as_a_user, small, shape):
    with pytest.raises(ValueError, match=r"expected latents of shape .* got .*channels last"):
        small.decode(jnp.zeros(shape))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((5, 16, 16, 3), "expected a video of shape"),
        ((1, 3, 5, 16, 16), "channels last"),
        ((1, 4, 16, 16, 3), r"4k\+1 frames .* got 4 frames of 16x16"),
        ((1, 5, 16, 20, 3), r"multiples of 8, got 5 frames of 16x20"),
        ((1, 0, 16, 16, 3), "expected a video of shape"),
    ],
)
def test_encode_refuses_shapes(as_a_user, small, shape, message):
    with pytest.raises(ValueError, match=message):
        small.encode(jnp.zeros(shape))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_residual": True}, "is_residual must be False; got True"),
        ({"patch_size": 2}, "patch_size must be None; got 2"),
        ({"attn_scales": [1.0]}, "attn_scales must be"),
        ({"latents_mean": [0.0]}, r"latents_mean must have 16 values .*; got 1"),
        ({"latents_std": [0.0] * 16}, r"latents_std \[0\] must be a number at least 0\.001"),
        ({"temperal_downsample": [True]}, r"temperal_downsample must have 3 values .*; got 1"),
        ({"out_channels": 4}, "out_channels must be 3; got 4"),
        ({"base_dim": "96"}, "base_dim"),
        ({"dim_mult": 4}, "dim_mult"),
        ({"latents_mean": ["a"] * 16}, "latents_mean"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        VAEConfig.from_dict(dev_config(**changes))


def test_config_lists_missing_keys():
    config = dev_config()
    del config["z_dim"], config["base_dim"]
    with pytest.raises(ValueError, match=r"base_dim is missing(.|\n)*z_dim is missing"):
        VAEConfig.from_dict(config)


def test_single_file_needs_config():
    with pytest.raises(ValueError, match="pass config"):
        load_vae(FIXTURES / "wan/vae_diffusers.safetensors")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
