"""Which of Wan's models a config is of: one that does not run here is named when it is refused."""

from collections.abc import Callable, Mapping
from typing import Any

from astraea_jax import checks

_NOTHING = (None, False, [], [None, None])

RUNS = "what runs here is Wan 2.1 text-to-video (1.3B, 14B)"


def _says(values: Mapping[str, Any], *names: str) -> bool:
    """Whether one of these fields is on: neither null nor [null, null], false or empty."""
    return any(checks.OneOf(_NOTHING).problem(values.get(name)) for name in names)


def _named(values: Mapping[str, Any], *words: str) -> bool:
    """Whether the class or the kind of model has one of these words in it."""
    said = [values.get(name) for name in ("_class_name", "model_type")]
    return any(word in kind.lower() for kind in said if isinstance(kind, str) for word in words)


def _takes_channels(values: Mapping[str, Any], count: int) -> bool:
    given = (values.get(name) for name in ("in_channels", "in_dim", "z_dim"))
    return any(isinstance(value, int) and value == count for value in given)


_VACE = ("vace_layers", "vace_in_channels", "vace_in_dim")
_IMAGE = ("image_dim", "added_kv_proj_dim", "image_encoder", "image_processor")

_SIGNS: tuple[tuple[str, Callable[[Mapping[str, Any]], bool]], ...] = (
    ("Wan VACE (video editing)", lambda v: _says(v, *_VACE) or _named(v, "vace")),
    ("Wan 2.2 Animate", lambda v: _named(v, "animate")),
    ("Wan 2.2 S2V (speech-to-video)", lambda v: _named(v, "s2v", "speechtovideo")),
    (
        "Wan 2.1 FLF2V (first and last frame to video)",
        lambda v: _says(v, "pos_embed_seq_len") or _named(v, "flf2v"),
    ),
    (
        "Wan 2.2 TI2V-5B",
        lambda v: (
            _says(v, "expand_timesteps", "is_residual")
            or _named(v, "ti2v")
            or _takes_channels(v, 48)
        ),
    ),
    (
        "Wan 2.2 A14B (two experts)",
        lambda v: _says(v, "transformer_2", "boundary_ratio"),
    ),
    (
        "Wan image-to-video (I2V)",
        lambda v: _says(v, *_IMAGE) or _named(v, "i2v", "imagetovideo") or _takes_channels(v, 36),
    ),
    ("Wan video-to-video", lambda v: _named(v, "videotovideo")),
)
"""Models of the family and what tells them; the first that fits counts."""


def recognised(values: Any) -> str | None:
    """The model of the family that a config is of, where it is one that does not run here."""
    if not isinstance(values, Mapping):
        return None
    return next((name for name, fits in _SIGNS if fits(values)), None)


def advice(values: Any) -> str:
    """What a message proposes where a config is refused."""
    other = recognised(values)
    if other is None:
        return f"mend the file or take another model; {RUNS}"
    return f"this looks like {other}; {RUNS}"
