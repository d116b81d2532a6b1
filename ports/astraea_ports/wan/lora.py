"""Low-rank changes to a Wan transformer (LoRA), in the spellings that files have, merged on load.

A change to a weight W is `strength * alpha / rank * up @ down`; some files also hold whole
differences of weights and biases. Keys are a prefix, the weight's own key in Diffusers' layout or
the original one, and what the tensor is; kohya's keys have underscores for the dots between.

Source: Diffusers `loaders/lora_conversion_utils.py` lists the spellings.
"""

import functools
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from astraea_jax.checks import Refusal
from astraea_ports import matching
from astraea_ports.matching import Entry
from astraea_ports.tensor_files import Tensor, TensorFiles

PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.", "model.", "lora_unet_")
_KINDS = (
    (re.compile(r"(.*)\.(?:lora_A|lora_down|lora\.down)(?:\.default)?(?:\.weight)?"), "down"),
    (re.compile(r"(.*)\.(?:lora_B|lora_up|lora\.up)(?:\.default)?(?:\.weight)?"), "up"),
    (re.compile(r"(.*)\.alpha"), "alpha"),
    (re.compile(r"(.*)\.diff"), "diff"),
    (re.compile(r"(.*)\.(?:diff_b|lora_B(?:\.default)?\.bias)"), "diff_b"),
)

# Words of module names that hold an underscore themselves: kohya's keys lose the difference.
_COMPOUND = (
    *("self_attn", "cross_attn", "norm_q", "norm_k", "to_q", "to_k", "to_v", "to_out"),
    *("patch_embedding", "text_embedding", "time_embedding", "time_projection", "proj_out"),
    *("condition_embedder", "text_embedder", "time_embedder", "time_proj", "linear_1", "linear_2"),
)


class Lora(NamedTuple):
    """A file of changes, and how strongly to apply it.

    Attributes:
      file: .safetensors.
      strength: a factor on all changes; 1 is as trained.
    """

    file: str | os.PathLike[str]
    strength: float = 1.0


class _Change(NamedTuple):
    """How one weight or bias changes: the tensors, by what they are."""

    key: str
    parts: Mapping[str, Tensor]


def read_deltas(
    loras: Sequence[Lora],
    slots: Mapping[str, jax.ShapeDtypeStruct],
    tables: Sequence[Sequence[Entry]],
):
    """What the files add to each parameter (path, layer), as functions that compute it.

    Raises:
      Refusal: a tensor that belongs to no weight of this model, of the wrong shape or rank, or
        without its partner; all problems of a file in one error.
    """
    added = defaultdict(list)
    for file, strength in loras:
        files = TensorFiles([_checked(file)])
        changes, problems = _changes(files.tensors())
        for change in changes:
            fitted = _fit(change, slots, tables)
            if isinstance(fitted, str):
                problems.append(fitted)
                continue
            place, entry = fitted
            added[place].append(functools.partial(_delta, files, change, entry, strength))
        if problems:
            shown = "\n  ".join(problems[: matching.SHOWN_PER_KIND])
            raise Refusal(
                f"{file} does not fit this model: {len(problems)} problems; use a LoRA of this size"
                f" of Wan\n  {shown}"
            )
    return {place: functools.partial(_sum, parts) for place, parts in added.items()}


def _checked(file: str | os.PathLike[str]) -> Path:
    path = Path(file)
    if path.suffix != ".safetensors" or not path.is_file():
        raise Refusal(f"expected a LoRA as an existing .safetensors file; got {str(file)!r}")
    return path


def _changes(tensors: Sequence[Tensor]) -> tuple[list[_Change], list[str]]:
    """Groups a file's tensors by the weight or bias that they change."""
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    problems = []
    for tensor in tensors:
        hits = [(m[1], kind) for regex, kind in _KINDS if (m := regex.fullmatch(tensor.key))]
        if len(hits) != 1:
            problems.append(f"{tensor.key}: expected a name ending in lora_A, lora_up, diff, ...")
            continue
        name, kind = hits[0]
        parts[_plain(name) + (".bias" if kind == "diff_b" else ".weight")][kind] = tensor
    changes = []
    for key, found in parts.items():
        if ("down" in found) != ("up" in found) or found.keys() == {"alpha"}:
            problems.append(f"{key}: expected lora_A and lora_B (down and up), got {list(found)}")
        else:
            changes.append(_Change(key, found))
    return changes, problems


def _plain(name: str) -> str:
    """A module's name without a prefix, dots between its parts."""
    underscored = name.startswith("lora_unet_")
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
    while prefix:
        name = name[len(prefix) :]
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
    if not underscored:
        return name
    for word in _COMPOUND:
        name = re.sub(rf"(?<![a-z]){word}(?![a-z\d])", word.replace("_", "-"), name)
    return name.replace("_", ".").replace("-", "_")


def _fit(change: _Change, slots, tables) -> tuple[tuple[str, int | None], Entry] | str:
    """The parameter that a change is for, or what is wrong with it."""
    shape = _shape(change.parts)
    if shape is None:
        down, up = change.parts["down"].shape, change.parts["up"].shape
        return f"{change.key}: expected down [rank, in] and up [out, rank], got {down} and {up}"
    tensor = Tensor(change.key, "F32", shape, Path())
    said = f"{change.key}: no such weight in this model"
    for table in tables:
        hits = [(m, e) for e in table if (m := re.fullmatch(e.pattern, change.key))]
        for match, entry in hits:
            layer = match.groupdict().get("layer")
            path, number = match.expand(entry.path), None if layer is None else int(layer)
            misfit = matching.misfit(matching.Match(tensor, entry, number), path, slots)
            if misfit is None:
                return (path, number), entry
            said = misfit[1]
    return said


def _shape(parts: Mapping[str, Tensor]) -> tuple[int, ...] | None:
    """The shape of the whole change; None where down and up don't multiply."""
    if "up" not in parts:
        return next(t.shape for kind, t in parts.items() if kind != "alpha")
    up, down = parts["up"].shape, parts["down"].shape
    if len(up) < 2 or len(down) < 2 or up[1] != down[0]:
        return None
    return (up[0], *down[1:])


def _delta(files: TensorFiles, change: _Change, entry: Entry, strength: float) -> np.ndarray:
    """The change in the parameter's layout, float32."""
    parts = {kind: files.read(t).astype(np.float32) for kind, t in change.parts.items()}
    total = sum(parts[kind] for kind in ("diff", "diff_b") if kind in parts)
    if "up" in parts:
        up, down = parts["up"], parts["down"]
        rank = down.shape[0]
        scale = parts["alpha"].item() / rank if "alpha" in parts else 1.0
        product = up.reshape(-1, rank) @ down.reshape(rank, -1)
        total = total + scale * product.reshape(up.shape[0], *down.shape[1:])
    return entry.transform(np.asarray(total * strength, np.float32))


def _sum(parts) -> np.ndarray:
    """All that files add to one parameter."""
    return np.sum([part() for part in parts], axis=0)
