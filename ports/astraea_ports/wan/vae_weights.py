"""Loading the VAE's weights: the tables from checkpoint keys to parameters, in both layouts."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from astraea_ports import checkpoints
from astraea_ports.checkpoints import Entry
from astraea_ports.wan.vae import VAE, VAEConfig

_PART = r"(encoder|decoder)\."


def _conv(key: str, path: str, transform: checkpoints.Transform) -> tuple[Entry, Entry]:
    kernel = Entry(key + r"\.weight", path + ".kernel", transform)
    return kernel, Entry(key + r"\.bias", path + ".bias")


def _residual(key: str, path: str) -> tuple[Entry, ...]:
    return (
        Entry(key + r"\.(?P<n>norm[12])\.gamma", path + r".\g<n>", checkpoints.vector),
        *_conv(key + r"\.(?P<n>conv[12])", path + r".\g<n>", checkpoints.conv3d),
        *_conv(key + r"\.conv_shortcut", path + ".shortcut", checkpoints.linear),
    )


def _resample(key: str, path: str) -> tuple[Entry, ...]:
    return (
        *_conv(key + r"\.resample\.1", path + ".spatial", checkpoints.conv2d),
        *_conv(key + r"\.time_conv", path + ".time", checkpoints.time_conv),
    )


_ATTENTION = _PART + r"mid_block\.attentions\.0\."
TABLE = (
    *_conv("quant_conv", "quant", checkpoints.linear),
    *_conv("post_quant_conv", "post_quant", checkpoints.linear),
    *_conv(_PART + r"(conv_in|conv_out)", r"\1.\2", checkpoints.conv3d),
    Entry(_PART + r"norm_out\.gamma", r"\1.norm_out", checkpoints.vector),
    *_residual(_PART + r"mid_block\.resnets\.(\d)", r"\1.mid.blocks.\2"),
    Entry(_ATTENTION + r"norm\.gamma", r"\1.mid.attention.norm", checkpoints.vector),
    *_conv(_ATTENTION + r"to_qkv", r"\1.mid.attention.qkv", checkpoints.linear),
    *_conv(_ATTENTION + r"proj", r"\1.mid.attention.out", checkpoints.linear),
    *_residual(r"encoder\.down_blocks\.(\d+)", r"encoder.layers.\1"),
    *_resample(r"encoder\.down_blocks\.(\d+)", r"encoder.layers.\1"),
    *_residual(r"decoder\.up_blocks\.(\d)\.resnets\.(\d)", r"decoder.stages.\1.blocks.\2"),
    *_resample(r"decoder\.up_blocks\.(\d)\.upsamplers\.0", r"decoder.stages.\1.up"),
)
"""Diffusers' keys."""


def _original_residual(key: str, path: str) -> tuple[Entry, ...]:
    entries = [*_conv(key + r"\.shortcut", path + ".shortcut", checkpoints.linear)]
    for norm, conv, number in ((0, 2, 1), (3, 6, 2)):
        entries.append(
            Entry(rf"{key}\.residual\.{norm}\.gamma", f"{path}.norm{number}", checkpoints.vector)
        )
        entries += _conv(rf"{key}\.residual\.{conv}", f"{path}.conv{number}", checkpoints.conv3d)
    return tuple(entries)


def _original_stages(num_stages: int, num_blocks: int) -> tuple[Entry, ...]:
    """The decoder's flat list of layers: of each stage its blocks, then the upsampling."""
    entries = []
    for stage in range(num_stages):
        first = stage * (num_blocks + 2)
        for block in range(num_blocks + 1):
            key = rf"decoder\.upsamples\.{first + block}"
            entries += _original_residual(key, f"decoder.stages.{stage}.blocks.{block}")
        key = rf"decoder\.upsamples\.{first + num_blocks + 1}"
        entries += _resample(key, f"decoder.stages.{stage}.up")
    return tuple(entries)


_MIDDLE = _PART + r"middle\.1\."


def original_table(config: VAEConfig) -> tuple[Entry, ...]:
    """The original's keys; the number of blocks decides which layer is what."""
    return (
        *_conv("conv1", "quant", checkpoints.linear),
        *_conv("conv2", "post_quant", checkpoints.linear),
        *_conv(_PART + "conv1", r"\1.conv_in", checkpoints.conv3d),
        *_conv(_PART + r"head\.2", r"\1.conv_out", checkpoints.conv3d),
        Entry(_PART + r"head\.0\.gamma", r"\1.norm_out", checkpoints.vector),
        *_original_residual(_PART + r"middle\.0", r"\1.mid.blocks.0"),
        *_original_residual(_PART + r"middle\.2", r"\1.mid.blocks.1"),
        Entry(_MIDDLE + r"norm\.gamma", r"\1.mid.attention.norm", checkpoints.vector),
        *_conv(_MIDDLE + "to_qkv", r"\1.mid.attention.qkv", checkpoints.linear),
        *_conv(_MIDDLE + "proj", r"\1.mid.attention.out", checkpoints.linear),
        *_original_residual(r"encoder\.downsamples\.(\d+)", r"encoder.layers.\1"),
        *_resample(r"encoder\.downsamples\.(\d+)", r"encoder.layers.\1"),
        *_original_stages(len(config.multipliers), config.num_blocks),
    )


ORIGINAL_FILES = ("Wan2.1_VAE.safetensors", "Wan2.1_VAE.pth")
"""The VAE's file in a model's folder of the original layout; no config lies beside it."""

WAN_VAE: Mapping[str, Any] = {
    "base_dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "latents_mean": [
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    ],
    "latents_std": [
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    ],
}
"""What config.json says of the VAE of both sizes of Wan."""


def open_vae(
    source: checkpoints.Source,
    *,
    config: Mapping[str, Any] | VAEConfig | None = None,
    dtype: DTypeLike | None = None,
    revision: str | None = None,
) -> checkpoints.Loadable[VAE]:
    """Finds a VAE and holds its headers against its config; see `load_vae`."""
    if dtype is not None:
        checkpoints.float_dtype(dtype)
    config = config.to_dict() if isinstance(config, VAEConfig) else config
    place = checkpoints.find_part(
        source,
        folder="vae",
        kinds=("AutoencoderKLWan",),
        config=config,
        single=ORIGINAL_FILES,
        revision=revision,
        single_config=WAN_VAE,
    )
    parsed = VAEConfig.from_dict(place.config, name=f"the VAE's config of {source}")
    template = jax.eval_shape(lambda: VAE(parsed, nnx.Rngs(0)))
    template = template if dtype is None else checkpoints.with_dtype(template, dtype)
    return checkpoints.open_checkpoint(place.weights(), template, TABLE, original_table(parsed))


def load_vae(
    source: checkpoints.Source,
    *,
    config: Mapping[str, Any] | VAEConfig | None = None,
    dtype: DTypeLike | None = None,
    revision: str | None = None,
) -> VAE:
    """Loads a VAE in Diffusers' layout or the original one.

    Args:
      source: a folder with config.json and the weights, a whole model's folder or hub id, or a
        single file of weights (.safetensors; .pth where torch is installed).
      config: what config.json holds; needed with a single file that has none beside it and is not
        the original's.
      dtype: of the parameters and of the computation; None is float32, as upstream runs it.
      revision: of a hub id: a branch, a tag or a commit.

    Raises:
      Refusal: the config or the weights are missing, broken, or don't fit.
    """
    return open_vae(source, config=config, dtype=dtype, revision=revision).load()
