"""How strongly a LoRA was trained to act, where its tensors don't say it.

A change is `scale * up @ down`. kohya's files hold an alpha for each pair, and the scale is
alpha / rank; Diffusers and PEFT write one alpha for all, with exceptions by module, into the
header's texts or into adapter_config.json beside the file. kohya's `ss_network_alpha` is not read:
its own program takes a pair without an alpha for one of scale 1, and its converter multiplies the
scale into the tensors and keeps the text.

Source: PEFT `tuners/lora/layer.py` (`update_layer`), `utils/other.py` (`get_pattern_key`);
Diffusers `loaders/lora_base.py`; musubi-tuner `convert_lora.py`.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from astraea_jax import checks, files
from astraea_jax.checks import Refusal
from astraea_ports.checkpoints import lora_names

DIFFUSERS = "lora_adapter_metadata"
"""The text of a header in which Diffusers keeps PEFT's config, as JSON."""

PEFT = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"

_RANK, _ALPHA = checks.Whole(1, 1 << 20), checks.Number(0, 1e6, above=True)
_ALPHA_TENSOR = checks.Number(-1e6, 1e6)
_RULES = {
    "r": checks.OrNone(_RANK),
    "lora_alpha": _ALPHA,
    "use_rslora": checks.OrNone(checks.Flag()),
    "use_dora": checks.OrNone(checks.Flag()),
    "rank_pattern": checks.OrNone(checks.ByName(_RANK)),
    "alpha_pattern": checks.OrNone(checks.ByName(_ALPHA)),
    "peft_type": checks.OrNone(checks.OneOf(("LORA",))),
    "init_lora_weights": checks.Anything(),
}

# Names of modules, with at most a few wildcards: what a regular expression may do besides is slow.
_PATTERN = re.compile(r"\^?(?:[\w-]|\\?\.|(?:\\d|\[0-9\])\+|\.\*)+\$?")
_WILDCARDS = 2
_LONGEST = 100

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
"""Ways to begin a training that change the model's own weights too."""


class Source(NamedTuple):
    """One place that says a scale.

    Attributes:
      name: for messages.
      fields: as PEFT's config names them.
    """

    name: str
    fields: Mapping[str, Any]

    def scale(self, module: str, rank: int) -> float | str:
        """The scale of a module's change, or what is wrong with what is said of it."""
        said = self._of(module, "rank_pattern", "r")
        if said is not None and said != rank:
            return f"{module}: {self.name} says rank {said}, and its tensors have {rank}"
        alpha = self._of(module, "alpha_pattern", "lora_alpha")
        return alpha / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)

    def _of(self, module: str, pattern_field: str, field: str) -> Any:
        """The first pattern that fits decides, as in PEFT; else the one value for all."""
        for pattern, value in (self.fields.get(pattern_field) or {}).items():
            if len(module) <= _LONGEST and re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
                return value
        return self.fields.get(field)


def sources(path: Path, texts: Mapping[str, str]) -> list[Source]:
    """All that is said of the scales of a file.

    Args:
      path: the file.
      texts: those of its header.

    Raises:
      Refusal: what is said is broken, or of an adapter that is no plain LoRA.
    """
    found = []
    if DIFFUSERS in texts:
        name = f"{DIFFUSERS} in the header of {path}"
        try:
            content = json.loads(texts[DIFFUSERS])
        except (ValueError, RecursionError) as error:
            raise Refusal(f"{name} is not valid JSON; fetch the file again") from error
        # What it says of a text encoder or of a second transformer is none of this one's.
        if not isinstance(content, Mapping) or any(_field(key) in _RULES for key in content):
            found.append(_source(name, content))
    flat = {key: _plain(text) for key, text in texts.items() if _field(key) in _RULES}
    if any(_field(key) == "lora_alpha" for key in flat):
        found.append(_source(f"the header of {path}", flat))
    config = path.with_name(PEFT)
    # Beside several files it belongs to the one that PEFT wrote with it.
    others = path.name != PEFT_WEIGHTS and os.path.lexists(path.with_name(PEFT_WEIGHTS))
    if os.path.lexists(config) and not others:
        found.append(_source(str(config), files.read_json(config, what="config of a LoRA")))
    return found


def _source(name: str, content: Any) -> Source:
    if not isinstance(content, Mapping):
        raise Refusal(f"expected {name} to be an object of fields; got {checks.shown(content)}")
    bare: dict[str, Any] = {}
    for key, value in content.items():
        field = _field(key)
        if field in bare and bare[field] != value:
            raise Refusal(
                f"{name} says {field} twice, {checks.shown(bare[field])} and "
                f"{checks.shown(value)}: expected one; mend the file"
            )
        bare[field] = value
    fields = checks.fields(bare, _RULES, name=name, required=("lora_alpha",), others=True)
    if fields.get("use_dora"):
        raise Refusal(
            f"{name} says use_dora: expected a plain LoRA, got a DoRA, which also rescales the "
            "weights that it changes: use another file"
        )
    begun = str(fields.get("init_lora_weights")).lower()
    if begun.startswith(_CHANGES_BASE):
        raise Refusal(
            f"{name} says init_lora_weights {checks.shown(begun)}: the model's own weights were "
            "changed before that training; convert it to a plain LoRA with PEFT"
        )
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in fields.get(field) or {}:
            wild = pattern.count("+") + pattern.count("*")
            if not _PATTERN.fullmatch(pattern) or wild > _WILDCARDS or len(pattern) > _LONGEST:
                raise Refusal(
                    f"{name}: {field} expected names of modules; got {checks.shown(pattern)}: "
                    "mend the file"
                )
    return Source(name, fields)


def _field(key: str) -> str:
    """A field's name without the part of the pipeline that Diffusers writes before it."""
    return lora_names.bare(key)


def _plain(text: str) -> Any:
    """What a text of a header stands for: a number, a truth value, an object."""
    known = {"True": True, "False": False, "None": None}
    if text in known:
        return known[text]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def scale(found: Sequence[Source], module: str, rank: int, alpha: float | None) -> float | str:
    """The scale of a module's change, or what is wrong.

    Args:
      found: all that is said beside the tensors; 1 if that is nothing.
      module: its name in the model.
      rank: of its tensors.
      alpha: that its own tensor says; it has the last word.
    """
    if alpha is not None:
        problem = _ALPHA_TENSOR.problem(alpha)
        return alpha / rank if problem is None else f"{module}: alpha {problem}"
    said: dict[float, str] = {}
    for source in found:
        value = source.scale(module, rank)
        if isinstance(value, str):
            return value
        said.setdefault(value, source.name)
    if len(said) > 1:
        differ = " and ".join(f"{value:g} by {name}" for value, name in said.items())
        return f"{module}: expected one scale, got {differ}"
    return next(iter(said), 1.0)
