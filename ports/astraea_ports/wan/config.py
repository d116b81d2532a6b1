"""Sizes of Wan's transformers: read from either layout's config.json, or by name."""

import dataclasses
from collections.abc import Mapping

from astraea_jax.checks import Refusal

_ORIGINAL = {
    "num_heads": "num_attention_heads",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "num_layers": "num_layers",
    "eps": "eps",
}
"""The original config.json's names, and Diffusers'."""


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

    @property
    def width(self) -> int:
        """Channels of a token, H."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, values: Mapping) -> "TransformerConfig":
        """Reads a config.json of Diffusers or of the original (`dim`, `num_heads`, ...).

        Raises:
          Refusal: a key that is missing, or a variant of Wan that is not text-to-video.
        """
        if "dim" in values:
            values = _from_original(values)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        required = [n for n, f in fields.items() if f.default is dataclasses.MISSING]
        missing = [name for name in required if values.get(name) is None]
        if missing:
            raise Refusal(f"expected a WanTransformer3DModel config; it lacks {missing}")
        expected = {"image_dim": None, "added_kv_proj_dim": None, "pos_embed_seq_len": None}
        expected |= {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads"}
        for name, value in expected.items():
            if values.get(name, value) != value:
                raise Refusal(f"{name} must be {value} (text-to-video); got {values[name]}")
        chosen = {name: values[name] for name in fields if values.get(name) is not None}
        chosen["patch_size"] = tuple(chosen.get("patch_size", cls.patch_size))
        return cls(**chosen)


def _from_original(values: Mapping) -> dict:
    """The original's config under Diffusers' names."""
    kind, dim, heads = values.get("model_type", "t2v"), values["dim"], values.get("num_heads")
    if kind != "t2v":
        raise Refusal(f"model_type must be t2v (text-to-video); got {kind!r}")
    if not isinstance(heads, int) or heads < 1 or dim % heads:
        raise Refusal(f"expected num_heads that divide dim ({dim}); got {heads!r}")
    named = {new: values[old] for old, new in _ORIGINAL.items() if old in values}
    named |= {"attention_head_dim": dim // heads, "text_dim": values.get("text_dim", 4096)}
    return named


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
