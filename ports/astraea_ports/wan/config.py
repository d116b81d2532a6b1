"""Sizes of Wan's transformers: read from either layout's config.json, or by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from astraea_jax import checks
from astraea_jax.checks import ListOf, OneOf, Refusal, Whole
from astraea_ports.checkpoints import configs
from astraea_ports.wan import family

_SHARED = {
    "freq_dim": Whole(2, configs.WIDEST),
    "text_dim": Whole(1, configs.WIDEST),
    "ffn_dim": Whole(1, 4 * configs.WIDEST),
    "num_layers": Whole(1, configs.LAYERS),
    "patch_size": ListOf(Whole(1, 16), 3, 3),
    "eps": configs.EPSILON,
    # Of other models of the family: known, to be refused for what they are.
    "vace_layers": configs.OFF,
    "vace_in_channels": configs.OFF,
    "vace_in_dim": configs.OFF,
    "pos_embed_seq_len": configs.OFF,
    "image_dim": configs.OFF,
    "added_kv_proj_dim": configs.OFF,
}

_RULES = _SHARED | {
    "_class_name": OneOf(("WanTransformer3DModel",)),
    "num_attention_heads": Whole(1, 1024),
    "attention_head_dim": Whole(6, 1024),
    "in_channels": Whole(1, 1024),
    "out_channels": Whole(1, 1024),
    "rope_max_seq_len": Whole(1, 1 << 20),
    "cross_attn_norm": OneOf((True,)),
    "qk_norm": OneOf(("rms_norm_across_heads",)),
}
"""The fields of Diffusers' config.json."""

_ORIGINAL_RULES = _SHARED | {
    "_class_name": OneOf(("WanModel",)),
    "model_type": OneOf(("t2v",)),
    "dim": Whole(6, configs.WIDEST),
    "num_heads": Whole(1, 1024),
    "in_dim": Whole(1, 1024),
    "out_dim": Whole(1, 1024),
    "text_len": Whole(2, configs.LONGEST_TEXT, "tokens"),
    "cross_attn_norm": OneOf((True,)),
    "qk_norm": OneOf((True,)),
    "window_size": OneOf(([-1, -1], (-1, -1))),
}
"""The fields of the original's config.json."""

_ORIGINAL = {
    "num_heads": "num_attention_heads",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "num_layers": "num_layers",
}
"""The original config.json's names that must be there, and Diffusers'."""


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a Wan transformer, named as in Diffusers' config.json.

    Attributes:
      num_attention_heads: heads, A.
      attention_head_dim: channels of a head, C; the width H is A * C.
      in_channels: latent channels.
      out_channels: velocity channels.
      text_dim: channels of the text embedding.
      freq_dim: channels of the sinusoidal time embedding.
      ffn_dim: hidden channels of the feed-forward.
      num_layers: blocks, L.
      patch_size: latent frames, rows and columns that make a token.
      eps: added inside every normalisation.
      rope_max_seq_len: largest position along an axis.

    Raises:
      Refusal: a size out of range or at odds with another; all of it in one message.
    """

    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    out_channels: int
    text_dim: int
    freq_dim: int
    ffn_dim: int
    num_layers: int
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    rope_max_seq_len: int = 1024

    def __post_init__(self):
        advice = "give sizes that a transformer can have"
        checks.fields(vars(self), _RULES, name="sizes", advice=advice)
        checks.refuse("sizes", self._problems(), advice)

    @property
    def width(self) -> int:
        """Channels of a token, H."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], *, name: str = "the transformer's config"
    ) -> "TransformerConfig":
        """Reads a config.json of Diffusers or of the original (`dim`, `num_heads`, ...).

        Args:
          values: what the file holds.
          name: of the file, for the message.

        Raises:
          Refusal: a field that is missing, unknown, out of range or at odds with another, or a
            model of Wan that is not text-to-video; all of it in one message.
        """
        advice = family.advice(values)
        if isinstance(values, Mapping) and "dim" in values:
            values = _from_original(values, name, advice)
        else:
            required = [
                field.name
                for field in dataclasses.fields(cls)
                if field.default is dataclasses.MISSING
            ]
            values = configs.read(values, _RULES, name=name, required=required, advice=advice)
        known = {field.name for field in dataclasses.fields(cls)}
        chosen = {key: value for key, value in values.items() if key in known}
        chosen["patch_size"] = tuple(chosen.get("patch_size", cls.patch_size))
        try:
            return cls(**chosen)
        except Refusal as error:
            raise Refusal(f"{name}: {error}; {advice}") from error

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads, as Diffusers writes it."""
        return {"_class_name": "WanTransformer3DModel"} | dataclasses.asdict(self)

    def _problems(self) -> list[str]:
        """What is wrong with the sizes together."""
        width = self.width
        block = 8 * width * width + 2 * width * self.ffn_dim
        outside = width * (8 * width + self.text_dim + self.freq_dim)
        problems = [*configs.too_many(self.num_layers * block + outside)]
        if width > configs.WIDEST:
            problems.append(
                f"num_attention_heads x attention_head_dim must be at most {configs.WIDEST}; got "
                f"{width}"
            )
        # An axis turns pairs of channels, and each of the three has some.
        if self.attention_head_dim % 2 or self.attention_head_dim < 6:
            problems.append(
                "attention_head_dim (of the original: dim / num_heads) must be an even number from "
                f"6; got {self.attention_head_dim}"
            )
        if self.freq_dim % 2:
            problems.append(f"freq_dim must be even; got {self.freq_dim}")
        if self.in_channels != self.out_channels:
            problems.append(
                "in_channels (in_dim) and out_channels (out_dim) must be equal: that many latent "
                f"channels are all that is read; got {self.in_channels} and {self.out_channels}"
            )
        return problems


def _from_original(values: Mapping[str, Any], name: str, advice: str) -> dict[str, Any]:
    """The original's config under Diffusers' names."""
    required = ["dim", *_ORIGINAL]
    values = configs.read(values, _ORIGINAL_RULES, name=name, required=required, advice=advice)
    width, heads = values["dim"], values["num_heads"]
    if width % heads:
        problem = f"num_heads must divide dim ({width}); got {heads}"
        checks.refuse(name, [problem], advice)
    named = {new: values[old] for old, new in _ORIGINAL.items()}
    named |= {key: values[key] for key in ("patch_size", "eps") if key in values}
    return named | {
        "attention_head_dim": width // heads,
        "text_dim": values.get("text_dim", 4096),
    }


T2V_1_3B = TransformerConfig(
    num_attention_heads=12,
    attention_head_dim=128,
    in_channels=16,
    out_channels=16,
    text_dim=4096,
    freq_dim=256,
    ffn_dim=8960,
    num_layers=30,
)
T2V_14B = dataclasses.replace(T2V_1_3B, num_attention_heads=40, ffn_dim=13824, num_layers=40)

CONFIGS = {"1.3B": T2V_1_3B, "14B": T2V_14B}
"""The two sizes of Wan 2.1 text-to-video, by name."""
