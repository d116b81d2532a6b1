"""Sizes of the Wan VAE, and the fields of its config.json."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from astraea_jax import checks
from astraea_jax.checks import Flag, ListOf, Number, OneOf, OrNone, Refusal, Whole
from astraea_ports.checkpoints import configs
from astraea_ports.wan import family

_FAR, _SMALL = 1e3, 1e-3
"""Bounds of the latents' statistics. What a VAE makes of pixels in -1..1 is of size 1 or so; past
these bounds float32 keeps three digits fewer of a latent, or of what it is normalised to."""

_REQUIRED = (
    *("base_dim", "z_dim", "num_res_blocks", "dim_mult"),
    *("temperal_downsample", "latents_mean", "latents_std"),
)

_NAMES = {
    "base_dim": "encoder_width",
    "decoder_base_dim": "decoder_width",
    "z_dim": "latent_channels",
    "dim_mult": "multipliers",
    "num_res_blocks": "num_blocks",
    "temperal_downsample": "temporal",
    "latents_mean": "latents_mean",
    "latents_std": "latents_std",
    "in_channels": "image_channels",
}
"""Fields of config.json -> of `VAEConfig`."""

_RULES = {
    "_class_name": OneOf(("AutoencoderKLWan",)),
    "base_dim": Whole(1, 8192),
    "decoder_base_dim": OrNone(Whole(1, 8192)),
    "z_dim": Whole(1, 1024),
    "num_res_blocks": Whole(1, 8),
    "dim_mult": ListOf(Whole(1, 64), 1, 6),
    "temperal_downsample": ListOf(Flag(), 0, 5),
    "latents_mean": ListOf(Number(-_FAR, _FAR), 1, 1024),
    "latents_std": ListOf(Number(_SMALL, _FAR), 1, 1024),
    "in_channels": OneOf((3,)),
    "out_channels": OneOf((3,)),
    "scale_factor_spatial": Whole(1, 64),
    "scale_factor_temporal": Whole(1, 64),
    # Of training alone, and a clamp of the video that is done here in any case.
    "dropout": Number(0, 1),
    "clip_output": Flag(),
    # Wan 2.2's residual and patched VAE; attention at other scales.
    "is_residual": OneOf((False,)),
    "patch_size": configs.OFF,
    "attn_scales": OneOf(([], ())),
}
"""The fields of config.json."""


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of a VAE; see Diffusers' `AutoencoderKLWan` for the keys of its config.json.

    Attributes:
      encoder_width: channels at full size in the encoder; stage i has `multipliers[i]` times that.
      decoder_width: the same for the decoder.
      num_blocks: residual blocks in an encoder stage; the decoder has one more.
      temporal: for each downsampling, whether it also halves the frames.
      latents_mean: of each latent channel, before normalisation.
      latents_std: likewise.

    Raises:
      Refusal: a size out of range or at odds with another; all of it in one message.
    """

    encoder_width: int
    decoder_width: int
    latent_channels: int
    multipliers: tuple[int, ...]
    num_blocks: int
    temporal: tuple[bool, ...]
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    image_channels: int = 3

    def __post_init__(self):
        advice = "give sizes that a VAE can have"
        named = {key: getattr(self, name) for key, name in _NAMES.items()}
        rules = _RULES | {"decoder_base_dim": _RULES["base_dim"]}
        checks.fields(named, rules, name="sizes", advice=advice)
        checks.refuse("sizes", self._problems(), advice)

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent position, along height and along width."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame, after the first."""
        return 2 ** sum(self.temporal)

    @property
    def decode_rim(self) -> int:
        """How far the decoder's layers that see a neighbourhood see, in latent positions."""
        last = len(self.multipliers) - 1
        seen = sum(2 * (self.num_blocks + 1) / 2**i for i in range(last + 1))
        seen += sum(1 / 2 ** (i + 1) for i in range(last)) + 1 / 2**last
        return math.ceil(seen)

    @property
    def encode_rim(self) -> int:
        """How far the encoder's layers that see a neighbourhood see, in latent positions."""
        last = len(self.multipliers) - 1
        pixels = 1 + sum(2 * self.num_blocks * 2**i for i in range(last + 1))
        pixels += sum(2 * 2**i for i in range(last))
        return math.ceil(pixels / self.spatial_factor)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], *, name: str = "the VAE's config") -> "VAEConfig":
        """Reads a config.json.

        Args:
          config: what the file holds.
          name: of the file, for the message.

        Raises:
          Refusal: a key is missing, unknown, out of range or at odds with another, or asks for
            what this file doesn't have (Wan 2.2's residual or patched VAE, attention at other
            scales); all of it in one message.
        """
        advice = family.advice(config)
        values = configs.read(config, _RULES, name=name, required=_REQUIRED, advice=advice)
        try:
            read = cls(
                encoder_width=values["base_dim"],
                decoder_width=values.get("decoder_base_dim") or values["base_dim"],
                latent_channels=values["z_dim"],
                multipliers=tuple(values["dim_mult"]),
                num_blocks=values["num_res_blocks"],
                temporal=tuple(values["temperal_downsample"]),
                latents_mean=tuple(map(float, values["latents_mean"])),
                latents_std=tuple(map(float, values["latents_std"])),
            )
        except Refusal as error:
            raise Refusal(f"{name}: {error}; {advice}") from error
        stated = {
            "scale_factor_spatial": read.spatial_factor,
            "scale_factor_temporal": read.temporal_factor,
        }
        problems = [
            f"{key} must be {factor}, as the downsamplings make it; got {values[key]}"
            for key, factor in stated.items()
            if values.get(key, factor) != factor
        ]
        checks.refuse(name, problems, advice)
        return read

    def _problems(self) -> list[str]:
        """What is wrong with the sizes together."""
        lengths = {
            "latents_mean": (len(self.latents_mean), self.latent_channels, "z_dim"),
            "latents_std": (len(self.latents_std), self.latent_channels, "z_dim"),
            "temperal_downsample": (
                len(self.temporal), len(self.multipliers) - 1, "one fewer than dim_mult has",
            ),
        }  # fmt: skip
        problems = [
            f"{key} must have {expected} values ({why}); got {got}"
            for key, (got, expected, why) in lengths.items()
            if got != expected
        ]
        if self.decoder_width * min(self.multipliers) < 2:
            problems.append("a stage of the decoder has one channel; an upsampling halves them")
        widest = max(self.encoder_width, self.decoder_width) * max(self.multipliers)
        blocks = 2 * len(self.multipliers) * (self.num_blocks + 3)
        problems += configs.too_many(blocks * 2 * 27 * widest * widest)
        return problems

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads."""
        own = {key: getattr(self, name) for key, name in _NAMES.items()}
        plain = {key: list(v) if isinstance(v, tuple) else v for key, v in own.items()}
        return {"_class_name": "AutoencoderKLWan", **plain, "out_channels": self.image_channels}
